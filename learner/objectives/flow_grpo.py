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

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learner.objectives.base import LiveGroup, Measurements, Objective, slices
from learner.objectives.formulas import clipped_surrogate
from policy.base import Condition, Policy
from policy.schedule import Schedule
from policy.sde import DEFAULT_NOISE_LEVEL, gaussian_kl, log_likelihood, step_gaussian
from services.config import Config, FlowGrpoConfig


class FlowGrpo(Objective):
    """The objective. Timestep i is the sampler's step from its i-th point to the next."""

    def __init__(self, policy: Policy, config: Config, schedule: Schedule) -> None:
        super().__init__(policy, config, schedule)
        assert isinstance(config.objective, FlowGrpoConfig)
        self._objective = config.objective
        self._noise_level = config.rollout.noise_level or DEFAULT_NOISE_LEVEL

    @property
    def uses_reference(self) -> bool:
        return False

    def accumulate(
        self,
        groups: Sequence[LiveGroup],
        timesteps: Sequence[int],
        *,
        step: int,
        scale: float,
        reference: Mapping[str, Tensor] | None,
    ) -> Measurements:
        measured = Measurements()
        micro_batch, group_size = self.config.learner.micro_batch, self.config.rollout.group_size
        at_once = max(1, micro_batch // group_size)
        for index in timesteps:
            for start in range(0, len(groups), at_once):
                some = groups[start : start + at_once]
                points, after, old = (
                    torch.cat(parts) for parts in zip(*(_step(group, index) for group in some), strict=True)
                )
                advantages = torch.cat([group.advantages for group in some])
                conditions = [group.condition for group in some]
                sums: dict[str, Tensor] = {}
                for samples in slices(len(advantages), micro_batch):
                    part = self._part(
                        index,
                        (points[samples], after[samples], old[samples], advantages[samples]),
                        conditions,
                        scale,
                    )
                    sums = {name: sums.get(name, 0) + value for name, value in part.items()}
                measured.add(len(some), **{name: value / group_size for name, value in sums.items()})
        return measured

    def _part(
        self,
        index: int,
        samples: tuple[Tensor, Tensor, Tensor, Tensor],
        conditions: Sequence[Condition],
        scale: float,
    ) -> dict[str, Tensor]:
        """Add the gradient of some samples; returns sums over them."""
        x, after, old, advantages = samples
        base = None
        if self._objective.kl > 0:
            with torch.no_grad(), self.phases("reference"), self.policy.base():
                base, _ = self._gaussian(index, x, conditions)
        with self.phases("forward"):
            mean, deviation = self._gaussian(index, x, conditions)
        likelihood = log_likelihood(after, mean, deviation)
        loss, cut = clipped_surrogate(likelihood, old, advantages, self._objective.clip_range)
        sums = {"clip_fraction": cut.to(loss.dtype).sum()}
        if base is not None:
            kl = gaussian_kl(mean, base, deviation)
            sums["kl"] = kl.detach().sum()
            loss = loss + self._objective.kl * kl
        self.backward(loss.sum() * (scale / self.config.rollout.group_size))
        return sums | {"loss": loss.detach().sum()}

    def _gaussian(self, index: int, x: Tensor, conditions: Sequence[Condition]) -> tuple[Tensor, Tensor]:
        guidance = self.config.rollout.guidance
        velocity = self.policy.velocity(
            x,
            self.schedule.timesteps[index],
            conditions,
            guidance=guidance,
            negative=self.policy.negative() if guidance > 1 else None,
        )
        return step_gaussian(self.schedule, index, x, velocity, self._noise_level)


def _step(group: LiveGroup, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(G, C, h, w) the points before and after a step, and (G,) the likelihoods it was drawn with."""
    if group.trajectory is None or group.log_likelihoods is None:
        raise ValueError(f"group {group.ordinal} came without its trajectory")
    return group.trajectory[:, index], group.trajectory[:, index + 1], group.log_likelihoods[:, index]


OBJECTIVES = {"flow_grpo": FlowGrpo}
