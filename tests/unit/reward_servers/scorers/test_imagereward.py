"""ImageReward on a tiny checkpoint in the published file format, against the formula written out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reward_servers.networks.image_reward import ImageRewardNetwork
from reward_servers.networks.pixels import CLIP_MEAN, CLIP_STD
from reward_servers.scorer import Scorer
from reward_servers.scorers import load_scorer
from reward_servers.wire import ScoreCall

VISION, DEPTH, HEADS, PATCH, SIDE = 128, 2, 2, 16, 32
TEXT, LAYERS, TEXT_HEADS = 24, 2, 3
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "##s", "on", "grass"]
CONFIG = {  # the fields of the published med_config.json, smaller
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "model_type": "bert",
    "num_attention_heads": TEXT_HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(TOKENS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}
PROMPTS = {
    "a red cat": ["a", "red", "cat"],
    "Dogs on grass": ["dog", "##s", "on", "grass"],
    "a cat on a dog on grass": ["a", "cat", "on", "a", "dog", "on", "grass"],
}
"""Prompts and their word pieces."""


def checkpoint() -> dict[str, Tensor]:
    """Random weights under the names of `ImageReward.pt`."""
    generator = torch.Generator().manual_seed(11)
    state: dict[str, Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) * into**-0.5
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.2
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, VISION, generator=generator)
    state[f"{vision}.pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, VISION, generator=generator)
    linear(f"{vision}.patch_embed.proj", VISION, 3 * PATCH**2)
    patches = state[f"{vision}.patch_embed.proj.weight"]
    state[f"{vision}.patch_embed.proj.weight"] = patches.view(VISION, 3, PATCH, PATCH)
    for part in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        state[f"{vision}.{part}"] *= 0.01  # so small that the epsilon of the first norm shows
    for block in (f"{vision}.blocks.{index}" for index in range(DEPTH)):
        norm(f"{block}.norm1", VISION)
        linear(f"{block}.attn.qkv", 3 * VISION, VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.mlp.fc1", 2 * VISION, VISION)
        linear(f"{block}.mlp.fc2", VISION, 2 * VISION)
    norm(f"{vision}.norm", VISION)
    state[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(
        len(TOKENS) + 2, TEXT, generator=generator
    )
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(48, TEXT, generator=generator)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(LAYERS)):
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", TEXT, width)
            linear(f"{layer}.{attention}.self.value", TEXT, width)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 40, TEXT)
        linear(f"{layer}.output.dense", TEXT, 40)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 8, VISION)
    linear("blip.text_proj", 8, TEXT)
    widths = {0: (TEXT, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for index, (into, out) in widths.items():
        linear(f"mlp.layers.{index}", out, into)
    return state


Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes the files, changed as told; returns the arguments of the scorer."""

    def write(change: Change = len, config: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
        state = checkpoint()
        change(state)
        torch.save(state, tmp_path / "ImageReward.pt")
        save_file(state, tmp_path / "ImageReward.safetensors")
        (tmp_path / "med_config.json").write_text(json.dumps(CONFIG if config is None else config))
        tokenizer = tmp_path / "bert-base-uncased"
        tokenizer.mkdir(exist_ok=True)
        (tokenizer / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
        (tokenizer / "tokenizer_config.json").write_text('{"do_lower_case": true}')
        (tokenizer / "config.json").write_text('{"model_type": "bert"}')
        return {"path": str(tmp_path), "tokenizer": str(tokenizer), **args}

    return write


@pytest.fixture
def pictures() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(4)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((32, 32), (40, 61), (90, 50))]


def call_of(pictures: list[NDArray[np.uint8]], prompts: list[str]) -> ScoreCall:
    return ScoreCall(pictures, prompts, [{}] * len(prompts))


def scores_of(scorer: Scorer, call: ScoreCall) -> list[float]:
    items = scorer.score(call)
    assert all(item.score is not None for item in items)
    return [item.score or 0.0 for item in items]


def published(state: dict[str, Tensor], picture: NDArray[np.uint8], prompt: str) -> float:
    """The whole formula for one pair, by the names of the published file; without padding."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return (weights @ v).transpose(0, 1).flatten(1)

    image = Image.fromarray(picture)
    ratio = SIDE / min(image.size)
    width, height = (int(side * ratio) for side in image.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.tensor(np.array(image.crop((left, top, left + SIDE, top + SIDE)))).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]

    name = "blip.visual_encoder"
    x = F.conv2d(
        pixels[None],
        state[f"{name}.patch_embed.proj.weight"],
        state[f"{name}.patch_embed.proj.bias"],
        stride=PATCH,
    )
    x = torch.cat([state[f"{name}.cls_token"][0], x[0].flatten(1).T]) + state[f"{name}.pos_embed"][0]
    for block in (f"{name}.blocks.{index}" for index in range(DEPTH)):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, HEADS))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    seen = norm(f"{name}.norm", x, 1e-6)

    ids = [TOKENS.index(piece) for piece in ("[CLS]", *PROMPTS[prompt], "[SEP]")]
    name = "blip.text_encoder"
    x = state[f"{name}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
    for layer in (f"{name}.encoder.layer.{index}" for index in range(LAYERS)):
        for attention in ("attention", "crossattention"):
            place = f"{layer}.{attention}"
            source = x if attention == "attention" else seen
            q = linear(f"{place}.self.query", x)
            k, v = (linear(f"{place}.self.{part}", source) for part in ("key", "value"))
            x = norm(
                f"{place}.output.LayerNorm",
                x + linear(f"{place}.output.dense", attend(q, k, v, TEXT_HEADS)),
                1e-12,
            )
        hidden = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", x + hidden, 1e-12)
    reward = x[0]
    for index in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{index}", reward)
    return (float(reward) - 0.16717) / 1.03334


@pytest.fixture
def scorer(publish: Callable[..., dict[str, Any]]) -> Scorer:
    return load_scorer("imagereward", publish(max_batch=2))


def test_the_published_formula(scorer: Scorer, pictures: list[NDArray[np.uint8]]) -> None:
    scorer.warm_up()
    state = checkpoint()
    expected = [published(state, picture, prompt) for picture, prompt in zip(pictures, PROMPTS, strict=True)]
    assert scores_of(scorer, call_of(pictures, list(PROMPTS))) == pytest.approx(expected, abs=2e-5)
    assert np.ptp(expected) > 0.01


def test_image_and_prompt_both_count(scorer: Scorer, pictures: list[NDArray[np.uint8]]) -> None:
    one, other, *_ = pictures
    first, second, *_ = PROMPTS
    scores = scores_of(scorer, call_of([one, other, one, other], [first, first, second, second]))
    assert min(abs(a - b) for i, a in enumerate(scores) for b in scores[:i]) > 1e-3


def test_pairs_only_and_each_image_once(
    scorer: Scorer, pictures: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    inner = ImageRewardNetwork.score

    def spy(self: ImageRewardNetwork, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        shapes.append((len(pixels), len(tokens)))
        return inner(self, pixels, tokens, mask)

    monkeypatch.setattr(ImageRewardNetwork, "score", spy)
    assert len(scorer.score(call_of(pictures, list(PROMPTS)))) == 3
    assert shapes == [(3, 3)]


def test_a_reward_that_is_not_finite_is_an_error(
    scorer: Scorer, pictures: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ImageRewardNetwork, "score", lambda self, pixels, tokens, mask: torch.tensor([0.5, float("nan")])
    )
    fine, broken = scorer.score(call_of(pictures[:2], list(PROMPTS)[:2]))
    assert fine.score == 0.5
    assert broken.score is None and "the network's output is not finite in float32" in (broken.error or "")


def test_a_long_prompt_is_cut_and_says_so(scorer: Scorer, pictures: list[NDArray[np.uint8]]) -> None:
    kept = " ".join(["cat"] * 33)  # with [CLS] and [SEP]: 35
    prompts = [kept, f"{kept} dog", "dog " + kept]
    items = scorer.score(call_of([pictures[0]] * 3, prompts))
    assert items[0].score == pytest.approx(items[1].score, abs=1e-5)
    assert abs((items[0].score or 0.0) - (items[2].score or 0.0)) > 1e-3
    assert [item.details["truncated"] for item in items] == [0, 1, 1]


def test_safetensors_and_a_path_to_the_file(
    publish: Callable[..., dict[str, Any]], pictures: list[NDArray[np.uint8]]
) -> None:
    args = publish()
    call = call_of(pictures, list(PROMPTS))
    expected = scores_of(load_scorer("imagereward", args), call)
    assert (
        scores_of(load_scorer("imagereward", {**args, "weights": "ImageReward.safetensors"}), call)
        == expected
    )
    file = str(Path(args["path"]) / "ImageReward.pt")
    assert scores_of(load_scorer("imagereward", {**args, "path": file}), call) == expected


def test_bfloat16_is_close(publish: Callable[..., dict[str, Any]], pictures: list[NDArray[np.uint8]]) -> None:
    call = call_of(pictures, list(PROMPTS))
    exact = scores_of(load_scorer("imagereward", publish()), call)
    rough = scores_of(load_scorer("imagereward", publish(dtype="bfloat16")), call)
    assert rough == pytest.approx(exact, abs=0.1) and rough != exact


def test_it_does_not_claim_batch_invariance(scorer: Scorer) -> None:
    assert not scorer.batch_invariant and scorer.max_batch == 2 and scorer.check("", {}) is None


@pytest.mark.parametrize(
    "name",
    [
        "blip.visual_encoder.cls_token",
        "blip.visual_encoder.pos_embed",
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.visual_encoder.norm.weight",
        "blip.text_encoder.encoder.layer.1.crossattention.self.value.weight",
        "blip.text_encoder.embeddings.word_embeddings.weight",
        "mlp.layers.6.bias",
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(
    publish: Callable[..., dict[str, Any]], name: str
) -> None:
    args = publish(lambda state: state.pop(name))
    with pytest.raises(ValueError, match=f"no weight {name}:"):
        load_scorer("imagereward", args)


def wrong_shape(state: dict[str, Tensor]) -> None:
    state["mlp.layers.7.weight"] = torch.zeros(2, 16)


def one_layer_more(state: dict[str, Tensor]) -> None:
    state["blip.text_encoder.encoder.layer.2.output.dense.bias"] = torch.zeros(TEXT)


@pytest.mark.parametrize(
    ("change", "config", "args", "says"),
    [
        (wrong_shape, CONFIG, {}, r"mlp.layers.7.weight has the shape \[2, 16\].* needs \[1, 16\]"),
        (one_layer_more, CONFIG, {}, "layer.2.output.dense.bias is one layer too many.* says 2"),
        (len, {**CONFIG, "hidden_size": 48}, {}, "has the shape .*24.* needs .*48"),
        (len, {"model_type": "bert"}, {}, "med_config.json: no 'vocab_size' in it"),
        (len, [], {}, "no configuration of BLIP's text encoder"),
        (len, {**CONFIG, "vocab_size": len(TOKENS) - 2}, {}, "word_embeddings.weight has the shape"),
        (len, CONFIG, {"weights": "other.pt"}, "other.pt"),
        (len, CONFIG, {"weights": "med_config.json"}, "med_config.json"),
        (len, CONFIG, {"path": "/nowhere/at/all"}, "/nowhere/at/all"),
        (len, CONFIG, {"tokenizer": "/nowhere/at/all"}, "/nowhere/at/all"),
        (len, CONFIG, {"device": "cuda:99"}, "cuda:99"),
        (len, CONFIG, {"batch": 3}, "no such argument: batch"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    publish: Callable[..., dict[str, Any]], change: Change, config: Any, args: dict[str, Any], says: str
) -> None:
    written = publish(change, config)
    with pytest.raises(ValueError, match=says):
        load_scorer("imagereward", {**written, **args})


def test_a_tokenizer_of_another_network_is_refused(publish: Callable[..., dict[str, Any]]) -> None:
    args = publish()
    with (Path(args["tokenizer"]) / "vocab.txt").open("a") as file:
        file.write("some\nmore\nwords\n")
    with pytest.raises(ValueError, match="15 tokens, where the network knows 14"):
        load_scorer("imagereward", args)


def test_objects_in_the_file_are_not_unpickled(publish: Callable[..., dict[str, Any]]) -> None:
    args = publish()
    torch.save({"mlp.layers.0.weight": Path("x")}, Path(args["path"]) / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"ImageReward\.pt"):
        load_scorer("imagereward", args)
