"""The code on a model card, executed with stock diffusers, draws what the trained policy draws: as it stands,
but for the place of a base that was a local folder.

In bfloat16 to rounding: `pytest --log-cli-level=info` prints how far, beside what that rounding does to the
stock pipeline alone.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_case import Case
from numpy.typing import NDArray
from tiny_pipelines import TINY, VARIANTS, build_sd3

from policy import load_policy
from policy.base_digest import base_digest
from policy.export import export_lora, export_policy, merged
from policy.model_card import Training
from policy.pipeline_policy import PipelinePolicy
from rollout_workers.sampling import sample
from services.config import RolloutConfig
from services.exported_lora import base_of, read_lora

logger = logging.getLogger(__name__)
PROMPT = "a red cube"
SEED = 0
"""That of the code on a card."""
LAST_DIGITS = 1
"""Of 255: the stock pipeline's weights lie as they do in their file, ours are aligned (policy/loading.py)."""
CHANGE = {"lora": 0.2, "full": 0.02}
"""Of a trained weight, so that images change a lot."""


def train(policy: PipelinePolicy) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            change = torch.randn(parameter.shape, generator=generator)
            parameter.add_(change * CHANGE[policy.config.train])


def ours(policy: PipelinePolicy, rollout: RolloutConfig) -> NDArray[np.int64]:
    latents = sample(policy, policy.encode(PROMPT), policy.negative(), (SEED,), rollout)
    return policy.decode(latents, batch=1)[0].astype(int)


def code(directory: Path, base: Path | None = None) -> str:
    """That of its card; of a LoRA whose base was a local folder with the place of that filled in."""
    card = (directory / "README.md").read_text()
    text = card.split("```python")[1].split("```")[0]
    if base is None or directory.name != "lora":
        return text
    asked = f'base = "path/to/{base.name}"  # where you have it\n'
    assert text.count(asked) == 1
    assert f"The base model was a local folder, `{base.name}`" in card
    assert str(base.parent) not in card
    return text.replace(asked, f"base = {str(base)!r}\n")


def run(text: str) -> NDArray[np.int64]:
    """The image that code from a card makes, in the working directory."""
    names: dict[str, Any] = {}
    exec(text, names)
    return np.asarray(names["image"]).astype(int)


def apart(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.abs(one - other)


@pytest.mark.parametrize(
    ("trained", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("full", "bfloat16")]
)
def test_the_code_of_a_card_draws_the_trained_images(
    case: Case, trained: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, rollout = case.load(train=trained, dtype=dtype), case.rollouts()[1]
    untrained = ours(policy, rollout)
    train(policy)
    images = ours(policy, rollout)
    change = apart(images, untrained).mean()
    assert change > 4
    made = export_policy(policy, tmp_path, rollout=rollout, training=Training(prompt=PROMPT))
    monkeypatch.chdir(tmp_path)
    for directory in made:
        drawn = run(code(directory, case.directory))
        error = apart(drawn, images)
        if dtype == "float32":
            assert error.max() <= (LAST_DIGITS if directory.name == "lora" else 2)
            if directory.name == "lora":
                # What an evaluation of it installs.
                own, read = policy.tensors(), read_lora(directory)
                assert read.keys() == own.keys()
                assert all(torch.equal(read[name], tensor) for name, tensor in own.items())
            continue
        logger.info(
            "%s, %s, %s: mean %.2f, largest %d; training moved %.1f",
            *(case.name, trained, directory.name, error.mean(), error.max(), change),
        )
        assert error.mean() < case.tiny.rounding
        assert error.mean() < change / 4
        if (directory.name, trained) == ("pipeline", "lora"):
            stock = apart(drawn, run(code(directory).replace("torch.bfloat16", "torch.float32")))
            logger.info(
                "%s, the same files in float32: mean %.2f, largest %d", case.name, stock.mean(), stock.max()
            )


@pytest.mark.parametrize(("trained", "dtype"), [("lora", "bfloat16"), ("full", "float32")])
def test_what_is_exported_is_what_peft_merges_and_copies_no_more(
    case: Case, trained: str, dtype: str
) -> None:
    policy = case.load(train=trained, dtype=dtype)
    train(policy)
    whole: Any = copy.deepcopy(policy.transformer)
    if trained == "lora":
        whole.fuse_lora()
        whole.unload_lora()
    expected, made = whole.to(getattr(torch, dtype)).state_dict(), merged(policy).state_dict()
    assert list(made) == list(expected)
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    assert all(tensor.dtype == expected[name].dtype for name, tensor in made.items())
    own = {tensor.data_ptr() for tensor in policy.transformer.state_dict().values()}
    copied = {name for name, tensor in made.items() if tensor.data_ptr() not in own}
    adapted = {name.partition(".lora_")[0] for name in policy.trainable() if ".lora_" in name}
    assert copied == {f"{name}.weight" for name in adapted}


def test_a_card_says_which_parts_there_are_none_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = VARIANTS["sd3.5-without-t5"]
    tiny.build(tmp_path / "base")
    policy = load_policy(tiny.config(tmp_path / "base"), text_encoders=True, vae=True)
    train(policy)
    rollout = tiny.sampling()
    images = ours(policy, rollout)
    monkeypatch.chdir(tmp_path)
    for directory in export_policy(policy, tmp_path, rollout=rollout, training=Training(prompt=PROMPT)):
        assert apart(run(code(directory, tmp_path / "base")), images).max() <= 2
        assert "no `text_encoder_3` and `tokenizer_3`" in (directory / "README.md").read_text()


def test_a_lora_names_its_base_and_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its branch has gone on since; nothing is asked of the network."""
    repository, pinned, later = tmp_path / "models--acme--tiny", "1" * 40, "2" * 40
    for commit in (pinned, later):
        build_sd3(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(later)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny = TINY["sd3.5-medium"]
    policy = load_policy(
        tiny.config(tmp_path, path="acme/tiny", revision=pinned), text_encoders=True, vae=True
    )
    train(policy)
    directory = export_lora(
        policy, tmp_path / "lora", rollout=tiny.sampling(), training=Training(prompt=PROMPT)
    )
    monkeypatch.chdir(tmp_path)
    text = code(directory)
    images = ours(policy, tiny.sampling())
    assert apart(run(text), images).max() <= LAST_DIGITS
    assert apart(run(text.replace(f'"{pinned}"', "None")), images).max() > 10
    card = (directory / "README.md").read_text()
    assert "base_model: acme/tiny\nbase_model_relation: adapter\n---\n\n# acme/tiny with Direct" in card
    assert f"| base model | [acme/tiny](https://huggingface.co/acme/tiny/tree/{pinned}), revision" in card
    digest = base_digest(policy.transformer.state_dict())
    assert base_of(directory).digest == digest
    assert f"| weights of the base model | digest `{digest}`; `dgpo eval` refuses others |\n" in card
    assert "LoRA of rank 4 and alpha 6, in the SD3Transformer2DModel: `attn.to_q`" in card
