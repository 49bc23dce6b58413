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

    They are not part of a checkpoint: after a resume, groups of before it are compared with the reference of
    now.

    Args:
        count: of past updates to keep.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[int, dict[str, Tensor]] = {}

    def keep(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy the reference of update `step`, into the memory of the oldest where there are enough."""
        if not self._count:
            return
        room = self._kept.pop(min(self._kept)) if len(self._kept) == self._count else None
        if room is None:
            room = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        torch._foreach_copy_(list(room.values()), [tensors[name].detach() for name in room])
        self._kept[step] = room

    def at(self, step: int | None) -> Mapping[str, Tensor] | None:
        """The reference of update `step`; None: it is the one of now, or not kept."""
        return None if step is None else self._kept.get(step)


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
