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


@dataclass(frozen=True)
class Schedule:
    """The points at which the model is evaluated, noisiest first."""

    timesteps: Tensor
    """(steps,) float32, what the model is told; about sigma * 1000."""
    sigmas: Tensor
    """(steps,) float32 noise levels in (0, 1]: x_t = (1 - sigma) x0 + sigma noise."""

    def __len__(self) -> int:
        return len(self.timesteps)


def make_scheduler(rollout: RolloutConfig) -> Any:
    """The stock diffusers scheduler of the `rollout` section, timesteps not set yet."""
    import diffusers

    schedulers: Any = diffusers
    if rollout.solver == "euler":
        return schedulers.FlowMatchEulerDiscreteScheduler(shift=rollout.shift)
    return schedulers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
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
    return Schedule(
        timesteps=scheduler.timesteps.to(torch.float32), sigmas=scheduler.sigmas[:-1].to(torch.float32)
    )
