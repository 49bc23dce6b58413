"""PickScore, CLIPScore, HPSv2 and the aesthetic predictor against their published formulas.

On tiny checkpoints in the published formats.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from reward_servers.scorer import ItemScore, Scorer
from reward_servers.scorers import hpsv2, load_scorer, scorer_names
from reward_servers.wire import ScoreCall
from tests.pickled_weights import pickle_weights
from tests.unit.reward_servers.networks.published_pixels import hps_square, processed, torchvision_resized
from tests.unit.reward_servers.networks.tiny_clip import (
    LONG,
    SIDE,
    VOCABULARY,
    WIDTH,
    OpenClip,
    architecture,
    photos,
    randomise,
    save_clip,
    save_tokenizer,
)

NAMES = ("pickscore", "clipscore", "hpsv2", "aesthetic")
PAIRS = ("pickscore", "clipscore", "hpsv2")
SIZES = ((32, 32), (40, 71), (90, 33), (17, 25), (64, 64))
PROMPTS = ("a cat", "a dog &amp;amp; a cat", LONG + "cat", "", "a cat")
HEAD_SIZES = (WIDTH, 12, 7, 6, 5, 1)


class Checkpoints:
    """Where the tiny checkpoints lie, and networks to compare with."""

    def __init__(self, folder: Path) -> None:
        self.clip = folder / "clip"
        self.network = save_clip(self.clip)
        self.tokenizer: CLIPTokenizer = save_tokenizer(self.clip)
        self.processor = folder / "processor"
        save_tokenizer(self.processor)
        self.open_clip = OpenClip().eval()
        randomise(self.open_clip, seed=2)
        self.hps = folder / "hps"
        self.hps.mkdir()
        checkpoint = {"epoch": 1, "name": "hps", "state_dict": self.open_clip.state_dict()}
        torch.save(checkpoint, self.hps / "HPS_v2.1_compressed.pt")
        self.head = nn.Sequential(
            nn.Linear(*HEAD_SIZES[0:2]),
            nn.Dropout(0.2),
            nn.Linear(*HEAD_SIZES[1:3]),
            nn.Dropout(0.2),
            nn.Linear(*HEAD_SIZES[2:4]),
            nn.Dropout(0.1),
            nn.Linear(*HEAD_SIZES[3:5]),
            nn.Linear(*HEAD_SIZES[4:6]),
        ).eval()
        self.head_state = {f"layers.{name}": value for name, value in self.head.state_dict().items()}
        self.head_file = folder / "sac+logos+ava1-l14-linearMSE.pth"
        torch.save(self.head_state, self.head_file)

    def args(self, name: str, **more: Any) -> dict[str, Any]:
        made: dict[str, dict[str, Any]] = {
            "pickscore": {"path": str(self.clip), "tokenizer": str(self.processor)},
            "clipscore": {"path": str(self.clip)},
            "hpsv2": {"path": str(self.hps), "tokenizer": str(self.processor)},
            "aesthetic": {"path": str(self.clip), "head": str(self.head_file)},
        }
        return {**made[name], **more}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    torch.manual_seed(4)
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


Load = Callable[..., Scorer]


@pytest.fixture
def load(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setattr(hpsv2, "VIT_H_14", architecture(activation="gelu"))
    return lambda name, **more: load_scorer(name, checkpoints.args(name, **more))


def call_of(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> ScoreCall:
    return ScoreCall(list(images), list(prompts), [{}] * len(images))


def scores(items: Sequence[ItemScore]) -> list[float]:
    assert all(item.error is None for item in items)
    return [item.score for item in items if item.score is not None]


@pytest.fixture(scope="module")
def call() -> ScoreCall:
    return call_of(photos(*SIZES), PROMPTS)


@torch.no_grad()
def logits(checkpoints: Checkpoints, pixels: Tensor, prompts: Sequence[str]) -> list[float]:
    """CLIP's own, of transformers' forward pass over all pairs, prompts padded to 77."""
    tokens = checkpoints.tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    found: list[float] = (
        checkpoints.network(pixel_values=pixels, **tokens).logits_per_image.diagonal().tolist()
    )
    return found


@pytest.mark.parametrize("scale", [1.0, 26.0])
def test_pickscore_is_the_published_formula(
    load: Load, checkpoints: Checkpoints, call: ScoreCall, scale: float
) -> None:
    found = scores(load("pickscore", scale=scale).score(call))
    expected = logits(checkpoints, processed(call.images, SIDE), PROMPTS)
    assert found == pytest.approx([value / scale for value in expected], abs=2e-4 / scale)
    assert max(expected) - min(expected) > 0.5


def test_clipscore_is_the_published_formula(load: Load, checkpoints: Checkpoints, call: ScoreCall) -> None:
    found = scores(load("clipscore").score(call))
    expected = logits(checkpoints, torchvision_resized(call.images, SIDE), PROMPTS)
    assert found == pytest.approx([value / 30 for value in expected], abs=1e-5)


def test_clipscore_can_resize_as_clip_was_trained(load: Load, call: ScoreCall) -> None:
    published, bicubic = (
        scores(load("clipscore", resize=kind).score(call)) for kind in ("bilinear", "bicubic")
    )
    assert published != pytest.approx(bicubic, abs=1e-3)
    assert bicubic == pytest.approx([value / 30 for value in scores(load("pickscore").score(call))], abs=0.1)


@torch.no_grad()
def test_hpsv2_is_the_published_formula(load: Load, checkpoints: Checkpoints, call: ScoreCall) -> None:
    """Against a network in open_clip's own layout, with open_clip's padding by zeros."""
    rows = []
    for prompt in PROMPTS:
        clean = prompt.replace("&amp;amp;", "&").strip()
        found = checkpoints.tokenizer(clean, truncation=True, max_length=77).input_ids
        rows.append(found + [0] * (77 - len(found)))
    images = checkpoints.open_clip.encode_image(
        torch.stack([hps_square(image, SIDE) for image in call.images])
    )
    texts = checkpoints.open_clip.encode_text(torch.tensor(rows))
    expected = torch.diagonal(images @ texts.T).tolist()
    assert scores(load("hpsv2").score(call)) == pytest.approx(expected, abs=3e-6)
    assert max(expected) - min(expected) > 0.01


@torch.no_grad()
def test_aesthetic_is_the_published_formula(load: Load, checkpoints: Checkpoints, call: ScoreCall) -> None:
    features = checkpoints.network.get_image_features(pixel_values=processed(call.images, SIDE)).pooler_output
    features = features / features.norm(dim=-1, keepdim=True)
    expected = checkpoints.head(features).squeeze(1).tolist()
    assert scores(load("aesthetic").score(call)) == pytest.approx(expected, abs=2e-6)
    assert scores(load("aesthetic", scale=10.0).score(call)) == pytest.approx(
        [value / 10 for value in expected], abs=2e-7
    )
    assert max(expected) - min(expected) > 1e-3


def test_the_aesthetic_head_may_be_safetensors_in_a_directory(
    load: Load, checkpoints: Checkpoints, call: ScoreCall, tmp_path: Path
) -> None:
    save_file(checkpoints.head_state, tmp_path / "head.safetensors")
    again = load("aesthetic", head=str(tmp_path), head_file="head.safetensors")
    assert again.score(call) == load("aesthetic").score(call)
    assert "head.safetensors" in again.model


def test_hpsv2_takes_the_file_itself(load: Load, checkpoints: Checkpoints, call: ScoreCall) -> None:
    again = load("hpsv2", path=str(checkpoints.hps / "HPS_v2.1_compressed.pt"))
    assert again.score(call) == load("hpsv2").score(call)
    assert "HPS_v2.1_compressed.pt" in again.model


@pytest.mark.parametrize("name", NAMES)
def test_a_scorer_is_named_after_its_file_and_warms_up(load: Load, name: str) -> None:
    assert name in scorer_names()
    scorer = load(name, max_batch=3)
    assert scorer.name == name and scorer.max_batch == 3 and not scorer.batch_invariant
    assert scorer.check("a cat", {}) is None
    scorer.warm_up()


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_change_scores(load: Load, call: ScoreCall, name: str) -> None:
    whole, split = (scores(load(name, max_batch=size).score(call)) for size in (16, 2))
    assert whole == pytest.approx(split, abs=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_one_score_an_image_and_each_prompt_encoded_once(
    load: Load, call: ScoreCall, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load(name)
    seen: dict[str, int] = {"text": 0, "image": 0}

    def count(kind: str) -> None:
        original = getattr(CLIPModel, f"get_{kind}_features")

        def counted(network: CLIPModel, **inputs: Tensor) -> Any:
            seen[kind] += len(next(iter(inputs.values())))
            return original(network, **inputs)

        monkeypatch.setattr(CLIPModel, f"get_{kind}_features", counted)

    count("text")
    count("image")
    items = scorer.score(call)
    assert len(items) == len(PROMPTS) and seen == {"text": len(set(PROMPTS)), "image": len(PROMPTS)}
    alone = [
        scorer.score(call_of([image], [prompt]))[0].score
        for image, prompt in zip(call.images, call.prompts, strict=True)
    ]
    assert scores(items) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_prompts_are_cut_at_77_tokens_and_said_to_be(load: Load, name: str) -> None:
    image = photos((32, 32))[0]
    ends = (LONG, LONG + "cat", LONG + "dog dog", LONG.replace("dog", "cat", 1))
    fits, longer, longest, other = load(name).score(call_of([image] * 4, ends))
    assert fits.score == pytest.approx(longer.score, abs=1e-4) == pytest.approx(longest.score, abs=1e-4)
    assert fits.score != pytest.approx(other.score, abs=1e-4)
    assert (fits.details["truncated"], longer.details["truncated"]) == (0, 1)
    assert json.dumps(longer.details)


def test_configurations_from_before_the_end_token_was_known(
    load: Load, checkpoints: Checkpoints, call: ScoreCall, tmp_path: Path
) -> None:
    """Published configurations say 2: the feature is that of the highest token, which is the same one."""
    save_clip(tmp_path, eos_token_id=2)
    legacy = load("pickscore", path=str(tmp_path))
    assert scores(legacy.score(call)) == pytest.approx(scores(load("pickscore").score(call)), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_and_its_formula_exact(load: Load, call: ScoreCall, name: str) -> None:
    exact, rounded = load(name).score(call), load(name, dtype="bfloat16").score(call)
    scale = {"pickscore": 100.0, "clipscore": 100 / 30}.get(name, 1.0)
    assert scores(rounded) == pytest.approx(scores(exact), abs=0.05 * scale)
    assert scores(rounded) != scores(exact)
    if name in ("pickscore", "clipscore"):
        factor = math.exp(2.6592) / (30 if name == "clipscore" else 1)
        for item in rounded:
            assert item.score == pytest.approx(item.details["cosine"] * factor, rel=1e-5)


def test_a_feature_that_is_not_finite_is_an_error(
    load: Load, checkpoints: Checkpoints, call: ScoreCall, tmp_path: Path
) -> None:
    save_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["visual_projection.weight"][:] = float("nan")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("pickscore", "aesthetic"):
        for item in load(name, path=str(tmp_path)).score(call):
            assert item.score is None and "not finite" in (item.error or "") and item.details == {}


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
@pytest.mark.parametrize("lost", ["logit_scale", "visual_projection.weight"])
def test_missing_weights_are_refused(load: Load, tmp_path: Path, name: str, lost: str) -> None:
    save_clip(tmp_path)
    save_tokenizer(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights of CLIPModel are missing .* such as {lost}"):
        load(name, path=str(tmp_path))


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
def test_a_pickled_network_is_refused(load: Load, tmp_path: Path, name: str) -> None:
    save_clip(tmp_path)
    save_tokenizer(tmp_path)
    pickle_weights(tmp_path)
    with pytest.raises(ValueError, match=r"no CLIPModel could be loaded .*no file named model\.safetensors"):
        load(name, path=str(tmp_path))


def test_another_network_is_refused(load: Load, tmp_path: Path) -> None:
    save_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="a checkpoint of 'bert', not of 'clip'"):
        load("pickscore", path=str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["empty", "absent"])
def test_a_directory_without_the_weights_is_named(load: Load, tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path / place}: "):
        load(name, path=str(tmp_path / place))


def test_a_directory_without_the_head_is_named(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file aesthetic-model\.pth there"):
        load("aesthetic", head=str(tmp_path))


@pytest.mark.parametrize("name", PAIRS)
def test_a_directory_without_a_tokenizer_is_refused(load: Load, tmp_path: Path, name: str) -> None:
    """transformers makes an empty tokenizer of it, without a word."""
    with pytest.raises(ValueError, match="a tokenizer of 2 tokens"):
        load(name, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="no such file or directory"):
        load(name, tokenizer=str(tmp_path / "absent"))


def test_the_tokenizer_of_another_network_is_refused(load: Load, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, [*VOCABULARY[:-2], "cats</w>", *VOCABULARY[-2:]])
    with pytest.raises(ValueError, match=f"of {len(VOCABULARY) + 1} tokens .* knows {len(VOCABULARY)}"):
        load("pickscore", tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {name: value for name, value in state.items() if "7" not in name}, "layers.7.bias"),
        (lambda state: {**state, "layers.1.weight": torch.zeros(1)}, "layers.1.weight"),
        (lambda state: {**state, "layers.0.weight": torch.zeros(12, 768)}, r"\(12, 768\), but takes 8"),
        (
            lambda state: {**state, "layers.2.weight": torch.zeros(7, 11)},
            r"layer 2 is \(7, 11\), but takes 12",
        ),
        (
            lambda state: {**state, "layers.7.weight": torch.zeros(2, 5), "layers.7.bias": torch.zeros(2)},
            "gives 2 numbers",
        ),
    ],
)
def test_another_head_is_refused(
    load: Load, checkpoints: Checkpoints, tmp_path: Path, change: Any, says: str
) -> None:
    torch.save(change(checkpoints.head_state), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=says):
        load("aesthetic", head=str(tmp_path / "head.pth"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"scale": 0}, "scale"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_batch": 0}, "max_batch"),
        ({"gpu": 1}, "no such argument: gpu"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(load: Load, name: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"scorer '{name}': args: {says}"):
        load(name, **args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_there_is_named(load: Load, name: str) -> None:
    with pytest.raises(ValueError, match="device 'cuda'"):
        load(name, device="cuda")
