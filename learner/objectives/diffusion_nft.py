"""DiffusionNFT (arXiv 2509.16117): regression towards good samples and away from bad ones, on noised samples.

    v+ = (1 - beta) v_old + beta v          x+ = x_t - sigma v+         r = A / (2 A_max) + 1/2, in [0, 1]
    v- = (1 + beta) v_old - beta v          x- = x_t - sigma v-
    loss = A_max / beta * (r |x+ - x0|^2 / w+ + (1 - r) |x- - x0|^2 / w-) + kl |v - v_base|^2

with |.|^2 the mean over elements, and w the mean of |x+ - x0| (without gradient): the published code's
adaptive weight, in the place of the paper's w(t). A_max is `advantage.clip`. v_old is the EMA reference,
whose weights rollouts sample with.

It costs a sample and timestep 3 forwards' worth, and one for each other model: the old policy where it
differs from the policy, and the base where there is a KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learner.objectives.base import LiveGroup, OptimizerStep, SamplewiseObjective
from learner.objectives.formulas import adaptive_error, dsm_error, kl_penalty
from learner.objectives.forward_process import NoisedBatch, noised
from policy.base import Policy
from policy.schedule import Schedule
from services.config import Config, DiffusionNftConfig


class DiffusionNft(SamplewiseObjective[NoisedBatch]):
    """The objective."""

    def __init__(self, policy: Policy, config: Config, schedule: Schedule) -> None:
        super().__init__(policy, config, schedule)
        assert isinstance(config.objective, DiffusionNftConfig)
        self._objective = config.objective

    @property
    def uses_reference(self) -> bool:
        return True

    def _batch(self, groups: Sequence[LiveGroup], index: int, step: int) -> NoisedBatch:
        seed, shared = self.config.run.seed, self._objective.shared_noise
        return noised(groups, self.schedule, index, seed=seed, step=step, shared=shared)

    def _part(self, batch: NoisedBatch, advantages: Tensor, shared: OptimizerStep) -> dict[str, Tensor]:
        config = self._objective
        with torch.no_grad(), self.phases("reference"):
            old, base = self._others(batch, shared.reference)
        with self.phases("forward"):
            velocity = self.policy.velocity(batch.x, batch.timestep, batch.conditions)
        if old is None:
            old = velocity.detach()
        largest = self.config.advantage.clip
        good = (advantages / (2 * largest) + 0.5).clamp(0, 1)
        toward = (1 - config.beta) * old + config.beta * velocity
        away = (1 + config.beta) * old - config.beta * velocity
        loss = (largest / config.beta) * (
            good * adaptive_error(batch.x - batch.sigma * toward, batch.x0)
            + (1 - good) * adaptive_error(batch.x - batch.sigma * away, batch.x0)
        )
        sums = {"dsm": dsm_error(velocity.detach(), batch.target).sum()}
        if base is not None:
            kl = kl_penalty(velocity, base)
            sums["kl"] = kl.detach().sum()
            loss = loss + config.kl * kl
        self.backward(loss.sum() * (shared.scale / self.config.rollout.group_size))
        return sums | {"loss": loss.detach().sum()}

    def _others(
        self, batch: NoisedBatch, reference: Mapping[str, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities of the old policy (None: the policy's own) and of the base (None: there is no KL)."""
        old = base = None
        if reference is not None:
            with self.policy.swapped(reference):
                old = self.policy.velocity(batch.x, batch.timestep, batch.conditions)
        if self._objective.kl > 0:
            with self.policy.base():
                base = self.policy.velocity(batch.x, batch.timestep, batch.conditions)
        return old, base


OBJECTIVES = {"diffusion_nft": DiffusionNft}
