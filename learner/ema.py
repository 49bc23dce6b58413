"""Exponential moving averages of the policy: the reference, and the weights that are evaluated.

Promises
- float32, on the policy's device, one fused operation an update.
- The decay at update k is a closed formula of k, so a resumed run needs no counter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from services.config import LearnerConfig, WithReference


class Ema:
    """average <- decay * average + (1 - decay) * tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def fold(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        """Move the average towards `tensors`; decay 0 makes it an exact copy of them."""
        averages = list(self.tensors.values())
        new = [tensors[name].detach() for name in self.tensors]
        if decay == 0.0:
            torch._foreach_copy_(averages, new)
        else:
            torch._foreach_lerp_(averages, new, 1.0 - decay)


def reference_decay(config: WithReference, step: int) -> float:
    """Decay with which the policy at the start of update `step` enters the reference used in that update.

    Source: the published code's `old` adapter, min(0.3, 0.001 * step).
    """
    return min(config.reference_decay, config.reference_ramp * step)


def evaluation_decay(config: LearnerConfig, step: int) -> float | None:
    """Decay with which the policy after update `step` enters the evaluated EMA; None: not at this update.

    The warm-up (1 + step) / (10 + step) keeps the base model from lingering in a short run. The last update
    always counts: what is exported has seen it, also where `ema_every` exceeds `max_steps`.
    """
    done = step + 1
    if done % config.ema_every and done != config.max_steps:
        return None
    return min(config.ema_decay, (1 + step) / (10 + step))
