"""Sample one whole group: G seeds, one condition, one batch.

Promises
- The result follows from (weights, condition, seeds, rollout section) alone, on one machine type and thread
  count.
- Equals the latents of the stock pipeline with the same scheduler and one generator a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policy.base import Condition, Policy
from rollout_workers.solvers import Trajectory, solve, solve_stochastic
from services.config import RolloutConfig


def sample(
    policy: Policy,
    condition: Condition | Sequence[Condition],
    negative: Condition | None,
    seeds: Sequence[int],
    rollout: RolloutConfig,
) -> Tensor:
    """The final latents of a group.

    Args:
        condition: of the group's prompt; or several, each for equally many consecutive seeds.
        negative: of the empty prompt; needed when `rollout.guidance` is above 1.
        seeds: G of them, each determines the initial noise of its sample, and what a stochastic solver adds.

    Returns:
        (G, C, h, w) float32 latents x0, free of autograd.

    Raises:
        PolicyError: the model cannot be sampled so.
    """
    latents, _ = sample_trajectory(policy, condition, negative, seeds, rollout)
    return latents


def sample_trajectory(
    policy: Policy,
    condition: Condition | Sequence[Condition],
    negative: Condition | None,
    seeds: Sequence[int],
    rollout: RolloutConfig,
) -> tuple[Tensor, Trajectory | None]:
    """`sample`, and with `rollout.solver: sde` how the latents came about."""

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return policy.velocity(x, timestep, condition, guidance=rollout.guidance, negative=negative)

    policy.check_rollout(rollout)
    with torch.inference_mode():
        start = policy.initial_latents(seeds)
        if rollout.solver != "sde":
            # An inference tensor could not take part in training; a copy made out here can.
            latents, trajectory = solve(rollout, velocity, start), None
        else:
            latents, trajectory = solve_stochastic(rollout, velocity, start, seeds)
    if trajectory is not None:
        trajectory = Trajectory(trajectory.points.clone(), trajectory.log_likelihoods.clone())
    return latents.clone(), trajectory
