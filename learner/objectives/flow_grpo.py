"""Flow-GRPO (arXiv 2505.05470): a clipped policy gradient on every step of a stochastic sampler.

    ratio = exp(log p(x_next | x) - log p_old(x_next | x))           p from policy/sde.py
    loss  = max(-A ratio, -A clamp(ratio, 1 - c, 1 + c)) + kl * KL(p || p_base)

p_old is what the sample was drawn with: its likelihoods travel with the group, so a later policy may train on
it. The likelihoods are means over elements, as published; so is the KL. The published code divides it by the
noise alone: theirs is this one times the step's length in sigma, so the same `kl` weighs more here.

It costs a sample and step 3 forwards' worth (6 under guidance), and one (two) for the base where there is a
KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.objectives.base import LiveGroup, OptimizerStep, SamplewiseObjective
from learner.objectives.formulas import clipped_surrogate
from policy.base import Condition, Policy
from policy.schedule import Schedule
from policy.sde import DEFAULT_NOISE_LEVEL, gaussian_kl, log_likelihood, step_gaussian
from services.config import Config, FlowGrpoConfig


@dataclass(frozen=True)
class StepBatch:
    """Some samples at one step of the sampler."""

    index: int
    """Of the step in the schedule."""
    x: Tensor
    """(N, C, h, w) the points before it."""
    after: Tensor
    """(N, C, h, w) the points that were drawn."""
    log_likelihoods: Tensor
    """(N,) of those, under the policy that drew them."""
    conditions: Sequence[Condition]
    """Each shared by equally many consecutive samples."""

    def part(self, samples: slice) -> StepBatch:
        """Some of the samples of a batch that has one condition, or all of them."""
        return replace(
            self,
            x=self.x[samples],
            after=self.after[samples],
            log_likelihoods=self.log_likelihoods[samples],
        )


class FlowGrpo(SamplewiseObjective[StepBatch]):
    """The objective. Timestep i is the sampler's step from its i-th point to the next."""

    def __init__(self, policy: Policy, config: Config, schedule: Schedule) -> None:
        super().__init__(policy, config, schedule)
        assert isinstance(config.objective, FlowGrpoConfig)
        self._objective = config.objective
        self._noise_level = config.rollout.noise_level or DEFAULT_NOISE_LEVEL

    @property
    def uses_reference(self) -> bool:
        return False

    def _batch(self, groups: Sequence[LiveGroup], index: int, step: int) -> StepBatch:
        points, after, likelihoods = [], [], []
        for group in groups:
            if group.trajectory is None or group.log_likelihoods is None:
                raise ValueError(f"group {group.ordinal} came without its trajectory")
            points.append(group.trajectory[:, index])
            after.append(group.trajectory[:, index + 1])
            likelihoods.append(group.log_likelihoods[:, index])
        conditions = [group.condition for group in groups]
        return StepBatch(index, torch.cat(points), torch.cat(after), torch.cat(likelihoods), conditions)

    def _part(self, batch: StepBatch, advantages: Tensor, shared: OptimizerStep) -> dict[str, Tensor]:
        base = None
        if self._objective.kl > 0:
            with torch.no_grad(), self.phases("reference"), self.policy.base():
                base, _ = self._gaussian(batch)
        with self.phases("forward"):
            mean, deviation = self._gaussian(batch)
        likelihood = log_likelihood(batch.after, mean, deviation)
        loss, cut = clipped_surrogate(
            likelihood, batch.log_likelihoods, advantages, self._objective.clip_range
        )
        sums = {"clip_fraction": cut.to(loss.dtype).sum()}
        if base is not None:
            kl = gaussian_kl(mean, base, deviation)
            sums["kl"] = kl.detach().sum()
            loss = loss + self._objective.kl * kl
        self.backward(loss.sum() * (shared.scale / self.config.rollout.group_size))
        return sums | {"loss": loss.detach().sum()}

    def _gaussian(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        guidance = self.config.rollout.guidance
        velocity = self.policy.velocity(
            batch.x,
            self.schedule.timesteps[batch.index],
            batch.conditions,
            guidance=guidance,
            negative=self.policy.negative() if guidance > 1 else None,
        )
        return step_gaussian(self.schedule, batch.index, batch.x, velocity, self._noise_level)


OBJECTIVES = {"flow_grpo": FlowGrpo}
