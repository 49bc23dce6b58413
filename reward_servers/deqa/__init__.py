"""DeQA-Score, a vision-language model that rates image quality, in an environment of its own.

The published model runs on code that lies beside its weights, is written for transformers 4.36.1, and patches
Llama in the process that imports it. So it is no file of scorers/: it has its own Python environment and
process, and speaks the reward protocol like every other reward.

The environment, once (Python 3.11, CUDA 12.1; about 6 GB), and the weights, 16.4 GB in float16:

    python3.11 -m venv deqa-env
    deqa-env/bin/pip install -r reward_servers/deqa/requirements.txt
    deqa-env/bin/huggingface-cli download zhiyuanyou/DeQA-Score-Mix3 --revision COMMIT \\
        --include '*.safetensors' '*.json' '*.py' tokenizer.model --local-dir DeQA-Score-Mix3

The server, from the root of a checkout. The project itself is not installed there: it needs a later torch and
transformers, and this part of it needs neither Ray nor them.

    DEQA_TOKEN=... deqa-env/bin/python -m reward_servers.deqa --allow-remote-code \\
        --model DeQA-Score-Mix3 --token-env DEQA_TOKEN --host 0.0.0.0 --port 8107

`--allow-remote-code` says that you have read the *.py files of that directory, or trust them. They are all
that runs: nothing is fetched, and weights are read from safetensors only. In a run the reward is a `url`:

    rewards:
      - {name: deqa, url: "http://HOST:8107", token_env: DEQA_TOKEN, heldout: true}

Formula and preprocessing: formula.py, without torch. Source: arXiv 2501.11561, its repository (MIT).
"""
