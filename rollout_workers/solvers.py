"""ODE solvers from noise to final latents: Euler and DPM-Solver++ 2M, diffusers' own.

Promises
- Deterministic: the final latents follow from the initial ones, the weights and the condition.
- The stock pipeline with the same scheduler takes exactly the same steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from policy.schedule import make_scheduler
from services.config import RolloutConfig

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""(x, timestep) -> velocity, shapes (N, C, h, w), () and (N, C, h, w)."""


def solve(rollout: RolloutConfig, velocity: VelocityFunction, x: Tensor) -> Tensor:
    """Integrate from noise to sigma 0.

    Args:
        rollout: names the solver, its steps and its shift.
        velocity: evaluated `rollout.steps` times.
        x: (N, C, h, w) initial latents.

    Returns:
        (N, C, h, w) final latents x0.
    """
    # A scheduler keeps what it has seen of a trajectory, so each gets its own.
    scheduler = make_scheduler(rollout)
    scheduler.set_timesteps(rollout.steps, device=x.device)
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep), timestep, x, return_dict=False)[0]
    return x.to(torch.float32)
