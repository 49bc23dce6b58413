"""LoRA adapters in a diffusion transformer, through peft.

Promises
- Adapters are float32 and start at exactly zero effect: A is normal with std 1/rank ("gaussian"), B is zero.
- They multiply in the dtype of the frozen weights (policy/lowered_adapters.py).
- Their start follows from the seed alone, so every process that loads the model has the same adapters.
- `adapters_switched` runs the frozen model, or the adapted one, and changes no flag that autograd looks at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from policy.errors import PolicyError
from services.config import LoraConfig

ADAPTER_NAME = "default"
IN_BLOCK = re.compile(r".*blocks\.\d+\.(.+)")
"""The name of a module that is repeated in every block, without the block."""


def add_lora(transformer: Any, config: LoraConfig, *, seed: int, targets: Sequence[str]) -> None:
    """Put trainable adapters on every linear layer whose name ends in one of `targets`.

    Raises:
        PolicyError: an ending matches no module.
    """
    import peft

    make_config: Any = peft.LoraConfig
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = sorted({found[1] for found in map(IN_BLOCK.fullmatch, names) if found})
            raise PolicyError(
                f"model.lora.targets: {target!r} ends the name of no linear layer; "
                f"valid endings: {', '.join(endings)}"
            )
    transformer.requires_grad_(False)
    transformer.add_adapter(
        make_config(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(targets),
            init_lora_weights="gaussian",
        ),
        adapter_name=ADAPTER_NAME,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(transformer.named_parameters()):
            if not parameter.requires_grad:
                continue
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                start = torch.randn(parameter.shape, generator=generator) / config.rank
                parameter.copy_(start)
    if any(parameter.dtype != torch.float32 for parameter in transformer.parameters()):
        # Here and not above: importing peft takes seconds.
        from policy.lowered_adapters import lower_adapters

        lower_adapters(transformer)


@contextmanager
def adapters_switched(transformer: nn.Module, *, off: bool) -> Iterator[None]:
    """Run with the adapters off, or on, whatever they are around this block.

    peft's own switch also flips `requires_grad`, which would cut a graph that is being built around this
    block; the flag its forward looks at is set alone.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = off
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag
