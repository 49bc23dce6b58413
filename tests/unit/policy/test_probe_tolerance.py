"""How far apart roundings bring the velocity of one model, and that the default tolerances bear no more.

With `--log-cli-level=info` it tells the figures of docs/architecture.md.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from policy import Policy, load_policy
from policy.probe import TOLERANCE, probe, probe_error
from services.config import LoraConfig, ModelConfig
from services.run_directory import PROJECT_ROOT

LORA = LoraConfig(rank=4, alpha=8)


def shipped(name: str, width: int) -> ModelConfig:
    return ModelConfig(path=str(PROJECT_ROOT / "quickstart" / name), height=32, width=width, lora=LORA)


def deep(directory: Path) -> ModelConfig:
    """As deep as SD3.5-medium, a third as wide, and of torch's own initial weights."""
    shutil.copytree(PROJECT_ROOT / "quickstart" / "model", directory, dirs_exist_ok=True)
    stored = json.loads((directory / "transformer" / "config.json").read_text())
    shape = {
        "num_layers": 24,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "caption_projection_dim": 512,
        "sample_size": 64,
        "pos_embed_max_size": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SD3Transformer2DModel(**{k: v for k, v in stored.items() if not k.startswith("_")} | shape)
    shutil.rmtree(directory / "transformer")
    made.save_pretrained(directory / "transformer")
    return ModelConfig(path=str(directory), height=128, width=128, lora=LORA)


@pytest.mark.parametrize("name", ["model", "shapes_model", pytest.param("deep", marks=pytest.mark.slow)])
def test_the_default_tolerances_bear_rounding_and_no_more(name: str, tmp_path: Path) -> None:
    config = deep(tmp_path) if name == "deep" else shipped(name, 64 if name == "model" else 32)

    def load(dtype: str = "float32") -> Policy:
        return load_policy(config.model_copy(update={"dtype": dtype}), text_encoders=False, vae=False)

    policy = load()
    exact = probe(policy)
    rounded = probe_error(exact, probe(load("bfloat16")))
    with tf32(policy.transformer):
        less = probe_error(exact, probe(policy))
    logging.getLogger(__name__).info("%s: TF32 %.1e, bfloat16 %.1e", name, less, rounded)
    assert probe(load()) == exact
    assert 0 < 2 * less < TOLERANCE[torch.float32] < rounded < TOLERANCE[torch.bfloat16] / 3


@contextmanager
def tf32(model: nn.Module) -> Iterator[None]:
    """TF32 as GPUs have it: what is multiplied has 10 bits of mantissa, what is added up has float32's."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    own = [layer.weight.data for layer in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: (_ten_bits(given[0]), *given[1:]))
        for layer in layers
    ]
    try:
        for layer in layers:
            layer.weight.data = _ten_bits(layer.weight.data)
        yield
    finally:
        for layer, weight, hook in zip(layers, own, hooks, strict=True):
            layer.weight.data = weight
            hook.remove()


def _ten_bits(tensor: Tensor) -> Tensor:
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
