"""The noise schedule of the solvers, from diffusers' own schedulers: one place for sampling and training.

Promises
- Rollouts, training timesteps and exported pipelines use the same timesteps and sigmas.
- A scheduler is made fresh for each use: diffusers schedulers hold the state of one sampling run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.config import RolloutConfig

DEFAULT_ORDER = 2
"""Of DPM-Solver++."""


@dataclass(frozen=True)
class Schedule:
    """The points at which the model is evaluated, noisiest first."""

    timesteps: Tensor
    """(steps,) float32, what the model is told; about sigma * 1000."""
    sigmas: Tensor
    """(steps,) float32 noise levels in (0, 1]: x_t = (1 - sigma) x0 + sigma noise."""

    @property
    def following(self) -> Tensor:
        """(steps,) the noise level at which each step ends; 0 for the last."""
        return torch.cat([self.sigmas[1:], self.sigmas.new_zeros(1)])

    def __len__(self) -> int:
        return len(self.timesteps)


def make_scheduler(rollout: RolloutConfig) -> Any:
    """The stock diffusers scheduler of the `rollout` section, timesteps not set yet."""
    import diffusers

    schedulers: Any = diffusers
    # Without its noise, Flow-GRPO's sampler takes Euler's steps.
    if rollout.solver in ("euler", "sde"):
        return schedulers.FlowMatchEulerDiscreteScheduler(shift=rollout.shift)
    if rollout.solver == "heun":
        return schedulers.FlowMatchHeunDiscreteScheduler(shift=rollout.shift)
    return schedulers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=rollout.order or DEFAULT_ORDER,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=rollout.shift,
        final_sigmas_type="zero",
    )


def make_schedule(rollout: RolloutConfig) -> Schedule:
    """The schedule that `make_scheduler(rollout)` steps through."""
    scheduler = make_scheduler(rollout)
    scheduler.set_timesteps(rollout.steps)
    timesteps, sigmas = scheduler.timesteps.to(torch.float32), scheduler.sigmas[:-1].to(torch.float32)
    if rollout.solver == "heun":
        # Points where two steps meet are listed twice: the second evaluation of one, the first of the next.
        points = [0, *range(1, len(timesteps), 2)]
        timesteps, sigmas = timesteps[points], sigmas[points]
    return Schedule(timesteps=timesteps, sigmas=sigmas)
