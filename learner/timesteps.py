"""Which solver steps an update trains on: the timestep clip.

Promises
- Distinct steps among the first (noisiest) ones, without replacement, shared by all groups of the update.
- They follow from (run seed, step) alone, never from the epoch or the process.
"""

from __future__ import annotations

import random

from learner.seeds import derive_seed
from services.config import TimestepConfig


def training_timesteps(
    config: TimestepConfig, *, seed: int, step: int, optimizer_steps: int
) -> tuple[tuple[int, ...], ...]:
    """Indices into the solver's schedule, one tuple an optimizer step.

    Args:
        seed: of the run.
        step: the update, from 0.
        optimizer_steps: how many parts `config.per_update` indices are split into.

    >>> parts = training_timesteps(TimestepConfig(first=8, per_update=4), seed=0, step=3, optimizer_steps=2)
    >>> [len(part) for part in parts]
    [2, 2]
    """
    if config.per_update % optimizer_steps:
        raise ValueError(
            f"{config.per_update} timesteps cannot be split evenly over {optimizer_steps} optimizer steps"
        )
    drawn = random.Random(derive_seed("timesteps", seed, step)).sample(range(config.first), config.per_update)
    size = config.per_update // optimizer_steps
    return tuple(tuple(drawn[start : start + size]) for start in range(0, config.per_update, size))
