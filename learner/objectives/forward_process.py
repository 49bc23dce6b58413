"""Noised samples: what objectives train on that need only the final latents of a group.

x_t = (1 - sigma) x0 + sigma noise,      velocity to be learnt: noise - x0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.objectives.base import LiveGroup
from policy.base import Condition
from policy.schedule import Schedule
from services.seeds import derive_seed


@dataclass(frozen=True)
class NoisedBatch:
    """Some samples at one timestep, as the model sees them.

    What the model sees is computed whenever it is asked for, which costs nothing beside the model: of a group
    in pieces, only the piece is in memory.
    """

    x0: Tensor
    """(N, C, h, w) final latents."""
    noise: Tensor
    """(N, C, h, w)."""
    sigma: Tensor
    """()."""
    timestep: Tensor
    """()."""
    conditions: Sequence[Condition]
    """Each shared by equally many consecutive samples."""

    @property
    def x(self) -> Tensor:
        """(N, C, h, w) x_t = (1 - sigma) x0 + sigma noise."""
        return (1 - self.sigma) * self.x0 + self.sigma * self.noise

    @property
    def target(self) -> Tensor:
        """(N, C, h, w) noise - x0."""
        return self.noise - self.x0

    def part(self, samples: slice) -> NoisedBatch:
        """Some of the samples of a batch that has one condition, or all of them."""
        return replace(self, x0=self.x0[samples], noise=self.noise[samples])


def noised(
    groups: Sequence[LiveGroup], schedule: Schedule, index: int, *, seed: int, step: int, shared: bool
) -> NoisedBatch:
    """Whole groups at timestep `index`.

    Args:
        seed: of the run; the noise follows from it, the step, the ordinal and the timestep alone.
        shared: one noise for all samples of a group, or one a sample.
    """
    x0 = _joined([group.latents for group in groups])
    return NoisedBatch(
        x0=x0,
        noise=_joined([_noise(group, index, seed, step, shared) for group in groups]),
        sigma=schedule.sigmas[index].to(x0),
        timestep=schedule.timesteps[index],
        conditions=[group.condition for group in groups],
    )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after another; of one tensor no copy is made."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _noise(group: LiveGroup, index: int, seed: int, step: int, shared: bool) -> Tensor:
    """(G, C, h, w); drawn on the CPU, so that every device sees the same."""
    shape = group.latents.shape
    drawn = (1 if shared else shape[0], *shape[1:])
    source = torch.Generator().manual_seed(derive_seed("noise", seed, step, group.ordinal, index))
    noise = torch.randn(drawn, generator=source)
    return noise.to(device=group.latents.device, dtype=group.latents.dtype).expand(shape)
