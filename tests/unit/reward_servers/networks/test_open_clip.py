"""Weights of open_clip give the same features in transformers' CLIPModel, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from reward_servers.networks.loading import read_weights
from reward_servers.networks.open_clip import load_open_clip, to_transformers
from reward_servers.scorers.hpsv2 import VIT_H_14
from tests.unit.reward_servers.networks.tiny_clip import SIDE, VOCABULARY, OpenClip, architecture, randomise


@pytest.fixture(scope="module")
def open_clip() -> OpenClip:
    network = OpenClip().eval()
    randomise(network)
    return network


def config(activation: str = "gelu") -> CLIPConfig:
    return CLIPConfig(**architecture(activation=activation))


@torch.no_grad()
def test_the_features_are_the_same(open_clip: OpenClip) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=generator)
    tokens = torch.randint(0, len(VOCABULARY) - 2, (3, 77), generator=generator)
    for row, end in zip(tokens, (3, 20, 76), strict=True):
        row[end:] = 0
        row[end] = len(VOCABULARY) - 1
    network = load_open_clip(open_clip.state_dict(), config(), "test")

    found_images = network.get_image_features(pixel_values=pixels).pooler_output
    found_texts = network.get_text_features(input_ids=tokens).pooler_output
    for found, expected in (
        (found_images, open_clip.encode_image(pixels)),
        (found_texts, open_clip.encode_text(tokens)),
    ):
        found = torch.nn.functional.normalize(found, dim=-1)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
        assert (found[0] - found[1]).abs().max() > 0.01
    assert network.logit_scale.item() == pytest.approx(4.6052)
    assert not network.training


@torch.no_grad()
def test_the_activation_matters(open_clip: OpenClip) -> None:
    pixels = torch.ones(1, 3, SIDE, SIDE)
    exact, quick = (
        load_open_clip(open_clip.state_dict(), config(kind), "test").get_image_features(pixels).pooler_output
        for kind in ("gelu", "quick_gelu")
    )
    assert (exact - quick).abs().max() > 1e-3


def without(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("visual.proj"), "1 missing, such as visual_projection.weight"),
        (without("transformer.resblocks.1.attn.in_proj_bias"), "3 missing, such as text_model.encoder"),
        (lambda state: {**state, "visual.attnpool.k_proj.weight": torch.zeros(1)}, "attnpool"),
        (lambda state: {**state, "transformer.resblocks.0.ls_1.gamma": torch.zeros(1)}, "ls_1"),
        (lambda state: {**state, "transformer.resblocks.0.attn.ln.weight": torch.zeros(1)}, "attn.ln"),
        (
            lambda state: {**state, "visual.transformer.resblocks.2.ln_1.weight": torch.zeros(16)},
            "1 unexpected, such as vision_model.encoder.layers.2.layer_norm1.weight",
        ),
        (lambda state: {**state, "visual.proj": torch.zeros(16, 9)}, "not the weights of this CLIP"),
    ],
)
def test_other_networks_are_refused(open_clip: OpenClip, change: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_open_clip(change(open_clip.state_dict()), config(), "test")


def test_half_precision_weights_become_float32(open_clip: OpenClip) -> None:
    state = {name: value.half() for name, value in open_clip.state_dict().items()}
    network = load_open_clip(state, config(), "test")
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}


def test_vit_h_14_is_open_clips() -> None:
    """Shapes and count of the published network: 986 million."""
    with torch.device("meta"):
        network = CLIPModel(CLIPConfig(**VIT_H_14))
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    assert sum(weight.numel() for weight in network.parameters()) == 986_109_441
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (257, 1280)
    assert shapes["visual_projection.weight"] == (1024, 1280)
    assert shapes["text_model.embeddings.token_embedding.weight"] == (49408, 1024)
    assert network.config.vision_config.hidden_act == network.config.text_config.hidden_act == "gelu"
    assert network.config.vision_config.num_attention_heads == 16


def test_names_of_a_whole_state(open_clip: OpenClip) -> None:
    state = to_transformers(open_clip.state_dict())
    source = open_clip.state_dict()["visual.transformer.resblocks.1.attn.in_proj_weight"]
    parts: list[Tensor] = [
        state[f"vision_model.encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"
    ]
    assert torch.equal(torch.cat(parts), source)
    assert "attn_mask" not in state


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({"state_dict": {"a": Malicious(trace)}}, file)
    with pytest.raises(ValueError, match="no weights could be read"):
        read_weights(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "expected a dictionary of tensors, found list"),
        ({}, "expected a dictionary of tensors"),
        ({"state_dict": {"step": 3}}, "step is no tensor"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=says):
        read_weights(file)
