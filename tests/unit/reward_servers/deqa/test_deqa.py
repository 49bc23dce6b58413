"""DeQA-Score: its formula, its loading of a checkpoint with code beside the weights, and its command.

The published environment (transformers 4.36.1) is not at hand here: the tiny checkpoint has the published
form (Llama with an image mark in `input_ids`, its code in the directory) and runs on the transformers that
is.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, CLIPImageProcessorPil, LlamaTokenizer

from reward_servers.client import RewardClient
from reward_servers.deqa import __main__ as command
from reward_servers.deqa.formula import (
    LEVELS,
    PROMPT,
    Preprocessing,
    level_probabilities,
    pixels,
)
from reward_servers.deqa.scorer import DeqaOptions, DeqaScorer
from reward_servers.local import LocalServer
from reward_servers.wire import ScoreCall
from tests.pickled_weights import pickle_weights

ROOT = Path(__file__).parents[4]
SIZE = 28
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_rescale": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
CONFIGURATION = """
from transformers.models.llama.configuration_llama import LlamaConfig


class MPLUGOwl2Config(LlamaConfig):
    model_type = "mplug_owl2"
"""
MODELING = """
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from .configuration_mplug_owl2 import MPLUGOwl2Config


class MPLUGOwl2LlamaForCausalLM(LlamaForCausalLM):
    config_class = MPLUGOwl2Config

    def __init__(self, config):
        super().__init__(config)
        self.vision = nn.Linear(3 * 28 * 28, config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, images=None, **more):
        seen = self.vision(images.flatten(1))[:, None]
        place = int((input_ids[0] == -200).nonzero())
        embed = self.get_input_embeddings()
        # Added to what follows, so that two layers are enough for the image to be seen in the last logits.
        parts = [embed(input_ids[:, :place]), seen, embed(input_ids[:, place + 1 :]) + 0.1 * seen]
        return super().forward(inputs_embeds=torch.cat(parts, dim=1), **more)
"""


def save_tokenizer(folder: Path) -> None:
    """Llama's: bytes, letters, and the five levels as one token each."""
    words = [f"▁{level}" for level in LEVELS]
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    letters = sorted({"▁", *PROMPT.replace(" ", "").replace("\n", ""), *"".join(LEVELS)})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """The directory of a published repository in small, and the network that was saved there."""
    folder = tmp_path_factory.mktemp("DeQA-Score-tiny")
    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "configuration_mplug_owl2.py").write_text(CONFIGURATION)
    (folder / "modeling_mplug_owl2_huggingface.py").write_text(MODELING)
    config = {
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config",
            "AutoModelForCausalLM": "modeling_mplug_owl2_huggingface.MPLUGOwl2LlamaForCausalLM",
        },
        "model_type": "mplug_owl2",
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "code-cache"))
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        network = AutoModelForCausalLM.from_config(loaded, trust_remote_code=True).float().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in network.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        network.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        yield folder, network


@pytest.fixture(scope="module")
def scorer(checkpoint: tuple[Path, Any]) -> DeqaScorer:
    loaded = DeqaScorer(DeqaOptions(model=checkpoint[0], device="cpu", dtype="float32", max_batch=4))
    loaded.warm_up()
    return loaded


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    """Wide, high, square, smaller and larger than the network's input."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((20, 33), (61, 40), (28, 28), (5, 5))]


def call_of(images: list[NDArray[np.uint8]]) -> ScoreCall:
    return ScoreCall(images, ["a cat"] * len(images), [{}] * len(images))


def published_pixels(images: list[NDArray[np.uint8]], config: dict[str, Any]) -> torch.Tensor:
    """Padding by Pillow, the rest by transformers."""
    colour = tuple(int(value * 255) for value in config["image_mean"])
    squares = []
    for image in images:
        picture = Image.fromarray(image)
        side = max(picture.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        squares.append(square)
    taken: torch.Tensor = CLIPImageProcessorPil(**config).preprocess(squares, return_tensors="pt")[
        "pixel_values"
    ]
    return taken


def test_scores_are_those_of_the_published_formula(
    scorer: DeqaScorer, checkpoint: tuple[Path, Any], pictures: list[NDArray[np.uint8]]
) -> None:
    folder, network = checkpoint
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    before, after = (tokenizer(part)["input_ids"] for part in PROMPT.split("<|image|>"))
    levels = [tokenizer(word)["input_ids"][1] for word in ("excellent", "good", "fair", "poor", "bad")]
    expected = []
    for image in pictures:
        ids = torch.tensor([[*before, -200, *after[1:]]])
        with torch.no_grad():
            logits = network(input_ids=ids, images=published_pixels([image], PREPROCESSOR)).logits
        expected.append(
            float(torch.softmax(logits[0, -1, levels], 0) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
        )
    items = scorer.score(call_of(pictures))
    scores = [item.score for item in items]
    assert scores == pytest.approx(expected, abs=2e-5)
    assert np.std(expected) > 0.02 and all(1 < score < 5 for score in expected)
    assert list(items[0].details["levels"]) == list(LEVELS)
    assert sum(items[0].details["levels"].values()) == pytest.approx(1)


def test_says_what_it_is(scorer: DeqaScorer) -> None:
    assert (scorer.name, scorer.version, scorer.max_batch, scorer.batch_invariant) == ("deqa", "1", 4, False)
    assert scorer.model.startswith("DeQA-Score-tiny") and scorer.full_version.startswith("1-")


def test_scores_can_be_divided(checkpoint: tuple[Path, Any], scorer: DeqaScorer) -> None:
    divided = DeqaScorer(DeqaOptions(model=checkpoint[0], device="cpu", dtype="float32", divide_by=5))
    image = [np.full((9, 9, 3), 77, np.uint8)]
    whole = scorer.score(call_of(image))[0].score
    assert whole is not None and divided.score(call_of(image))[0].score == pytest.approx(whole / 5)


def test_logits_that_are_not_finite_are_an_error(scorer: DeqaScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def probabilities(images: Any) -> NDArray[np.float64]:
        return level_probabilities(np.array([[0.0, np.inf, 0.0, 0.0, 0.0], [0.0] * 5]))

    monkeypatch.setattr(scorer, "probabilities", probabilities)
    broken, whole = scorer.score(call_of([np.zeros((4, 4, 3), np.uint8)] * 2))
    assert broken.score is None and "not finite" in (broken.error or "")
    assert whole.score == pytest.approx(3.0)


def test_a_checkpoint_without_all_weights_is_refused(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint[0], tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    del weights["vision.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, such as vision\.weight"):
        DeqaScorer(DeqaOptions(model=folder, device="cpu", dtype="float32"))


def test_pickled_weights_are_refused(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint[0], tmp_path / "pickled")
    pickle_weights(folder)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        DeqaScorer(DeqaOptions(model=folder, device="cpu", dtype="float32"))


@pytest.mark.parametrize("size", [SIZE, 448])
def test_pixels_are_those_of_transformers(pictures: list[NDArray[np.uint8]], size: int) -> None:
    config = {**PREPROCESSOR, "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    ours = pixels(pictures, Preprocessing.of(config))
    assert ours.dtype == np.float32 and ours.shape == (4, 3, size, size)
    assert np.abs(ours - published_pixels(pictures, config).numpy()).max() < 1e-5


def test_the_published_preprocessing_is_the_default() -> None:
    assert Preprocessing.of({**PREPROCESSOR, "size": 448, "crop_size": 448}) == Preprocessing()


@pytest.mark.parametrize(
    "change",
    [{"crop_size": 20}, {"resample": 2}, {"do_normalize": False}, {"size": {"height": 28, "width": 30}}],
)
def test_another_preprocessing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="preprocessor_config"):
        Preprocessing.of({**PREPROCESSOR, **change})
    with pytest.raises(ValueError, match="not CLIP's"):
        Preprocessing.of({"size": 28})


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_the_command_refuses_without_the_flag(
    capsys: pytest.CaptureFixture[str], checkpoint: tuple[Path, Any]
) -> None:
    said = refusal(capsys, "--model", str(checkpoint[0]), "--token-env", "T")
    assert "Python files that lie beside its weights" in said and "--allow-remote-code" in said


def test_the_command_refuses_without_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    allowed = ("--allow-remote-code", "--token-env", "T")
    assert "no config.json, preproc" in refusal(capsys, *allowed, "--model", str(tmp_path / "nowhere"))
    said = refusal(capsys, *allowed, "--model", "zhiyuanyou/DeQA-Score-Mix3")
    assert "must be a local directory" in said
    assert "required: --model" in refusal(capsys, *allowed)


def test_the_command_refuses_another_transformers(
    capsys: pytest.CaptureFixture[str], checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--allow-remote-code", "--model", str(checkpoint[0]), "--token-env", "T")
    installed = importlib.metadata.version("transformers")
    assert f"transformers 4.36.1 and patches Llama where it is imported; found {installed}" in refusal(
        capsys, *given
    )

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(command, "version", absent)
    assert "found none" in refusal(capsys, *given)


def test_the_command_refuses_without_a_token(
    capsys: pytest.CaptureFixture[str], checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "version", lambda name: "4.36.1")
    _offline(monkeypatch)
    given = ("--allow-remote-code", "--model", str(checkpoint[0]))
    assert "--token-env --token-file is required" in refusal(capsys, *given)
    assert "variable NOT_SET_ANYWHERE: expected a token" in refusal(
        capsys, *given, "--token-env", "NOT_SET_ANYWHERE"
    )


def test_the_command_serves_the_protocol(
    checkpoint: tuple[Path, Any], token: str, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []

    def serve(app: Any, *, host: str, port: int, **more: Any) -> None:
        assert (host, port) == ("127.0.0.1", 8199)
        with LocalServer(app) as server:
            client = RewardClient("deqa", server.url, token, app="deqa")
            served.append((client.info(), client.score(np.zeros((3, 8, 6, 3), np.uint8), "a cat")))
            client.close()

    monkeypatch.setattr(command, "serve_until_stopped", serve)
    monkeypatch.setattr(command, "version", lambda name: "4.36.1")
    _offline(monkeypatch)
    command.main(
        f"--allow-remote-code --model {checkpoint[0]} --token-file {token_file} --port 8199 --device cpu "
        "--dtype float32 --max-batch 2 --divide-by 5".split()
    )
    ((info, scored),) = served
    assert (info.reward, info.max_batch, info.batch_invariant) == ("deqa", 2, False)
    assert len(scored.scores) == 3 and all(0.2 < score < 1 for score in scored.scores)


def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets these for its process: taken back after the test."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def test_what_serves_it_needs_nothing_that_its_environment_lacks() -> None:
    """Nor does a refusal import the model's libraries."""
    lacking = (
        "ray",
        "torch",
        "transformers",
        "diffusers",
        "httpx",
        "tenacity",
        "onnxruntime",
        "cv2",
        "redis",
    )
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"{{name}} is not in the environment")
sys.meta_path.insert(0, Absent())
import reward_servers.app, reward_servers.local, reward_servers.deqa.formula
from reward_servers.deqa.__main__ import main
main(["--model", "nowhere", "--token-env", "T"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 2, ran.stderr
    assert "--allow-remote-code" in ran.stderr


def test_the_environment_is_pinned_to_what_the_command_wants() -> None:
    lines = (ROOT / "reward_servers/deqa/requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned["transformers"] == command.TRANSFORMERS
    assert {"torch", "numpy", "fastapi", "uvicorn", "pydantic", "safetensors", "pillow"} <= set(pinned)
