"""The noise schedule of the solvers, from diffusers' own schedulers: one place for sampling and training.

Promises
- Rollouts, training timesteps and exported pipelines use the same timesteps and sigmas.
- A scheduler is made fresh for each use: diffusers schedulers hold the state of one sampling run.
- The discrete variance-preserving (VP) schedule of SDXL is told in the terms of a flow: with sigma_ve its
  noise over its signal, the flow's noise level is sigma = sigma_ve / (1 + sigma_ve), and a step of Euler from
  one such level to the next is the same step in either form (policy/families/sdxl.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.errors import PolicyError
from services.config import RolloutConfig

DEFAULT_ORDER = 2
"""Of DPM-Solver++."""
OTHER_STEPS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("invert_sigmas", "stochastic_sampling"),
)
"""Settings of published schedulers that no rollout has."""

VP_SETTINGS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The noise schedule of every SDXL, and the steps of its published scheduler."""


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
    """The diffusers scheduler that a rollout steps with; `set_timesteps` sets its timesteps."""
    import diffusers

    schedulers: Any = diffusers
    # Without its noise, Flow-GRPO's sampler takes Euler's steps.
    if rollout.solver in ("euler", "sde"):
        return schedulers.FlowMatchEulerDiscreteScheduler(
            shift=rollout.shift, shift_terminal=rollout.terminal
        )
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


def set_timesteps(scheduler: Any, rollout: RolloutConfig, device: torch.device | None = None) -> None:
    """Give a scheduler of `make_scheduler` the steps of the rollout."""
    if rollout.sigmas == "fractions":
        fractions = np.linspace(1.0, 1 / rollout.steps, rollout.steps)
        scheduler.set_timesteps(sigmas=fractions, device=device)
    elif rollout.sigmas == "vp":
        sigmas = _vp_scheduler(rollout.steps).sigmas[:-1].to(torch.float64)
        scheduler.set_timesteps(sigmas=(sigmas / (1 + sigmas)).tolist(), device=device)
    else:
        scheduler.set_timesteps(rollout.steps, device=device)


def pipeline_scheduler(rollout: RolloutConfig) -> Any:
    """The scheduler with which a stock pipeline takes the steps of the rollout."""
    return _vp_scheduler() if rollout.sigmas == "vp" else make_scheduler(rollout)


def make_schedule(rollout: RolloutConfig) -> Schedule:
    """The schedule that a rollout steps through."""
    scheduler = make_scheduler(rollout)
    set_timesteps(scheduler, rollout)
    timesteps, sigmas = scheduler.timesteps.to(torch.float32), scheduler.sigmas[:-1].to(torch.float32)
    if rollout.solver == "heun":
        # Points where two steps meet are listed twice: the second evaluation of one, the first of the next.
        points = [0, *range(1, len(timesteps), 2)]
        timesteps, sigmas = timesteps[points], sigmas[points]
    return Schedule(timesteps=timesteps, sigmas=sigmas)


def initial_scale(rollout: RolloutConfig) -> float:
    """What unit noise is multiplied with at the start of a rollout.

    1 for flows, which start from pure noise. A VP schedule never reaches that: its stock scheduler starts
    from noise of the deviation that noised samples have, sqrt(sigma_ve^2 + 1) before the division by
    1 + sigma_ve.
    """
    if rollout.sigmas != "vp":
        return 1.0
    scheduler = _vp_scheduler(rollout.steps)
    return float(scheduler.init_noise_sigma) / (1 + float(scheduler.sigmas[0]))


def _vp_scheduler(steps: int | None = None) -> Any:
    import diffusers

    make: Any = diffusers.EulerDiscreteScheduler
    scheduler = make(**VP_SETTINGS)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def published_rollout(scheduler: Mapping[str, Any], *, sigmas: str, tokens: int) -> dict[str, object]:
    """The keys of the `rollout` section with which rollouts step as a published scheduler does.

    With dynamic shifting the shift follows from the number of image tokens: exp(mu), mu linear in it.

    Args:
        scheduler: its configuration.
        sigmas: `rollout.sigmas` that the stock pipeline gives to Euler's solver.
        tokens: of one image.

    Raises:
        PolicyError: it steps as no rollout can.
    """
    kind, dynamic = scheduler["_class_name"], bool(scheduler.get("use_dynamic_shifting"))
    odd = [name for name in OTHER_STEPS if scheduler.get(name)]
    # The scheduler's own steps are shifted twice at their end if the shift is fixed, and once if not.
    odd += ["use_dynamic_shifting"] if dynamic and sigmas == "scheduler" else []
    if odd or kind not in ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        raise PolicyError(
            f"the published scheduler is a {kind} {' '.join(['with', *odd]) if odd else ''}: no rollout "
            "takes its steps; choose rollout.solver and rollout.shift yourself"
        )
    if kind == "DPMSolverMultistepScheduler":
        order = int(scheduler.get("solver_order", DEFAULT_ORDER))
        own = {} if order == DEFAULT_ORDER else {"order": order}
        return {"solver": "dpmsolver++", "shift": float(scheduler.get("flow_shift") or 1.0), **own}
    shift = float(scheduler.get("shift", 1.0))
    if dynamic:
        few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = low + (tokens - few) * (high - low) / (many - few)
        shift = mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
    found: dict[str, object] = {"solver": "euler", "sigmas": sigmas, "shift": shift}
    if scheduler.get("shift_terminal"):
        found["terminal"] = float(scheduler["shift_terminal"])
    return found
