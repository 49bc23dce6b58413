"""Which solver steps an update trains on: the timestep clip.

Promises
- Distinct steps inside the window, without replacement, shared by all groups of the update.
- They follow from (run seed, step) alone, never from the epoch or the process.
"""

from __future__ import annotations

import itertools
import random

from torch import Tensor

from policy.schedule import make_schedule
from services.config import Config, TimestepConfig
from services.seeds import derive_seed


def timestep_window(config: TimestepConfig, sigmas: Tensor, shift: float) -> range:
    """The solver steps that may be trained on.

    Args:
        sigmas: (steps,) noise levels of the solver, falling.
        shift: of the flow, which turned t into sigma = shift t / (1 + (shift - 1) t).

    Raises:
        ValueError: fewer of them than an update draws.

    >>> import torch
    >>> timestep_window(TimestepConfig(first=3, per_update=2), torch.linspace(1, 0.1, 10), 3.0)
    range(0, 3)
    """
    if config.first is not None:
        end = config.first
    else:
        times = sigmas if config.t_min_of == "shifted" else sigmas / (shift - (shift - 1) * sigmas)
        assert config.t_min is not None
        # Times are computed in float32: a step that lies on the bound is inside.
        end = int((times >= config.t_min - 1e-6).sum())
    window = range(min(config.skip, end), end)
    if len(window) < config.per_update:
        raise ValueError(
            f"objective.timesteps: an update draws {config.per_update} of the solver steps from "
            f"{config.skip} up to {end}, which are {len(window)}; "
            "lower per_update, skip or t_min, or raise rollout.steps"
        )
    return window


def configured_window(config: Config) -> range:
    """The window of a run, before anything of it is there.

    Raises:
        ValueError: fewer steps in it than an update draws.
    """
    schedule = make_schedule(config.rollout)
    return timestep_window(config.objective.timesteps, schedule.sigmas, config.rollout.shift)


def training_timesteps(
    config: TimestepConfig, window: range, *, seed: int, step: int, optimizer_steps: int
) -> tuple[tuple[int, ...], ...]:
    """Indices into the solver's schedule, one tuple an optimizer step.

    Args:
        window: of `timestep_window`.
        seed: of the run.
        step: the update, from 0.
        optimizer_steps: how many parts `config.per_update` indices are split into.

    >>> clip = TimestepConfig(first=8, per_update=4)
    >>> parts = training_timesteps(clip, range(8), seed=0, step=3, optimizer_steps=2)
    >>> [len(part) for part in parts]
    [2, 2]
    """
    count = config.per_update
    if count % optimizer_steps:
        raise ValueError(f"{count} timesteps cannot be split evenly over {optimizer_steps} optimizer steps")
    dice = random.Random(derive_seed("timesteps", seed, step))
    if config.draw == "uniform":
        drawn = dice.sample(window, count)
    else:
        borders = [len(window) * part // count for part in range(count + 1)]
        drawn = [dice.choice(window[low:high]) for low, high in itertools.pairwise(borders)]
        dice.shuffle(drawn)
    size = count // optimizer_steps
    return tuple(tuple(drawn[start : start + size]) for start in range(0, count, size))
