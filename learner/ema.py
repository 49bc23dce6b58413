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


class PastReferences:
    """The reference as it was at the last updates, for groups that were sampled then.

    Args:
        tensors: the reference of now, which all of them are at first.
        count: of past updates to keep.
    """

    def __init__(self, tensors: Mapping[str, Tensor], count: int) -> None:
        self.kept = [Ema(tensors) for _ in range(count)]
        """The last update's first."""

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Another update is over, and this was its reference: a copy takes the place of the oldest."""
        if self.kept:
            oldest = self.kept.pop()
            oldest.fold(tensors, 0.0)
            self.kept.insert(0, oldest)

    def before(self, updates: int) -> Mapping[str, Tensor] | None:
        """The reference of so many updates ago; None: it is the one of now, or older than any kept."""
        return self.kept[updates - 1].tensors if 0 < updates <= len(self.kept) else None


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
