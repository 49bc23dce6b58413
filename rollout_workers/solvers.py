"""Solvers from noise to final latents: diffusers' own for the ODE, and Flow-GRPO's stochastic sampler.

Promises
- Deterministic: the final latents follow from the initial ones, the weights, the condition and, for the
  stochastic sampler, the seeds.
- The stock pipeline with the same scheduler takes exactly the steps of the ODE solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.schedule import initial_scale, make_schedule, make_scheduler, set_timesteps
from policy.sde import DEFAULT_NOISE_LEVEL, log_likelihood, step_gaussian
from services.config import RolloutConfig
from services.seeds import derive_seed

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""(x, timestep) -> velocity, shapes (N, C, h, w), () and (N, C, h, w)."""


@dataclass(frozen=True)
class Trajectory:
    """What the stochastic sampler went through, but for its last step, which is not stochastic."""

    points: Tensor
    """(N, steps, C, h, w) float32: the initial latents, and the points after each step but the last."""
    log_likelihoods: Tensor
    """(N, steps - 1) of each of those points given the one before."""


def solve(rollout: RolloutConfig, velocity: VelocityFunction, x: Tensor) -> Tensor:
    """Integrate the ODE from noise to sigma 0.

    Args:
        rollout: names the solver, its steps and its shift.
        velocity: evaluated at each step; by heun twice at each but the last.
        x: (N, C, h, w) initial latents, unit noise.

    Returns:
        (N, C, h, w) final latents x0.
    """
    # A scheduler keeps what it has seen of a trajectory, so each gets its own.
    scheduler = make_scheduler(rollout)
    set_timesteps(scheduler, rollout, x.device)
    x = x * initial_scale(rollout)
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep), timestep, x, return_dict=False)[0]
    return x.to(torch.float32)


def solve_stochastic(
    rollout: RolloutConfig, velocity: VelocityFunction, x: Tensor, seeds: Sequence[int]
) -> tuple[Tensor, Trajectory]:
    """Sample Flow-GRPO's SDE from noise to sigma 0; its last step is the ODE's.

    Args:
        x: (N, C, h, w) initial latents, unit noise.
        seeds: N of them, each determines the noise of its sample.

    Returns:
        (N, C, h, w) final latents x0, and how they came about.
    """
    schedule, x = make_schedule(rollout), x.to(torch.float32) * initial_scale(rollout)
    level = rollout.noise_level or DEFAULT_NOISE_LEVEL
    sources = [torch.Generator().manual_seed(derive_seed("sde", seed)) for seed in seeds]
    points, likelihoods = [x], []
    for index in range(len(schedule) - 1):
        speed = velocity(x, schedule.timesteps[index].to(x.device))
        mean, deviation = step_gaussian(schedule, index, x, speed, level)
        noise = torch.stack([torch.randn(x.shape[1:], generator=source) for source in sources])
        x = mean + deviation * noise.to(x)
        points.append(x)
        likelihoods.append(log_likelihood(x, mean, deviation))
    last = velocity(x, schedule.timesteps[-1].to(x.device))
    final = x - schedule.sigmas[-1].to(x) * last
    return final, Trajectory(torch.stack(points, dim=1), torch.stack(likelihoods, dim=1))
