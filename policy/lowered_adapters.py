"""LoRA that multiplies in the dtype of the frozen weights.

peft casts what enters an adapter to the adapter's own float32, and multiplies, scales and adds there. Beside
frozen weights in bfloat16 that is slow: without TF32 a GPU multiplies float32 at less than a tenth of the
rate, and each of the other steps goes through memory once more. Here the adapter, which is small, is cast,
and its weights stay float32.

Promises
- Where frozen weights are float32, or adapters off, merged, or not exactly one, it is peft's own.
- A pass with a graph and one without compute the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class LoweredLinear(Linear):  # type: ignore[misc]
    """A linear layer with one plain adapter: no bias, no dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if (
            len(names) != 1
            or self.disable_adapters
            or self.merged
            or x.dtype == self.lora_A[names[0]].weight.dtype
        ):
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        (name,) = names
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        frozen: Tensor = self.base_layer(x, *args, **kwargs)
        low = F.linear(x, down.to(x.dtype))
        return frozen + F.linear(low, (up * self.scaling[name]).to(x.dtype))


def lower_adapters(transformer: nn.Module) -> None:
    """Let every adapter that peft has put on a linear layer multiply so."""
    for module in transformer.modules():
        if type(module) is Linear:
            module.__class__ = LoweredLinear
