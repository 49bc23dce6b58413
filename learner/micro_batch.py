"""`learner.micro_batch: auto`: the most samples of a group that one forward-backward has memory for.

Tried with the real objective on a synthetic group, the whole of it first, then a half, and so on down to one
sample. A process that runs out of memory on a GPU is told so and can go on; on a CPU it is killed. There the
first try decides nothing, and `auto` is the whole group.

Promises
- No weight, no optimizer state and no generator of random numbers is changed, and no gradient is left.
- What a try held is given back before the next one.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.objectives.base import LiveGroup, Objective
from learner.ranks import Ranks
from policy.base import Condition
from services.config_file import ConfigError
from services.whole_file import write_whole

logger = logging.getLogger(__name__)


class MicroBatchFile:
    """What a run has found, in its directory, from its first update on: the sums of later updates must add up
    in the same order, also after a crash ahead of the first checkpoint."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / "micro_batch.json"

    def read(self) -> int | None:
        """None: nothing has been found yet.

        Raises:
            ConfigError: the file is not what `keep` wrote.
        """
        try:
            return int(json.loads(self._path.read_text())["micro_batch"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._path}: unreadable ({error!r}); delete it to have learner.micro_batch auto try "
                "again, which may change the last bits of what is trained from here on"
            ) from error

    def keep(self, micro_batch: int) -> None:
        """Written once."""
        if not self._path.exists():
            write_whole(self._path, json.dumps({"micro_batch": micro_batch}))


def sizes_to_try(group_size: int) -> list[int]:
    """Divisors of the group size, falling, each at most half of the one before.

    >>> sizes_to_try(24), sizes_to_try(9)
    ([24, 12, 6, 3, 1], [9, 3, 1])
    """
    sizes = [group_size]
    while sizes[-1] > 1:
        half = sizes[-1] // 2
        sizes.append(next(size for size in range(half, 0, -1) if group_size % size == 0))
    return sizes


def agreed_micro_batch(ranks: Ranks | None, objective: Objective, **try_with: Any) -> int | None:
    """`largest_micro_batch`; of several ranks the least that one of them has found, on all of them."""
    if ranks is None:
        return largest_micro_batch(objective, **try_with)

    def find() -> bytes:
        return str(largest_micro_batch(objective, **try_with) or 0).encode()

    return min(map(int, ranks.exchange("the micro-batch that fits", find))) or None


def largest_micro_batch(
    objective: Objective,
    *,
    condition: Condition,
    timestep: int,
    reference: Mapping[str, Tensor] | None,
    activations: Callable[[], AbstractContextManager[None]],
) -> int | None:
    """The first of `sizes_to_try` that fits; None: not even one sample does. `.grad` must be None.

    Args:
        objective: of the run; its micro-batch is another afterwards.
        condition: of a prompt as long as any.
        timestep: one that is trained on, of the schedule.
        reference: tensors of the EMA reference, if there is one.
        activations: what a forward-backward runs in.
    """
    device = objective.policy.device
    group = _synthetic(objective, condition)

    learner = objective.config.learner
    others = -(-learner.groups_per_step // learner.ranks) - 1

    def attempt(size: int) -> None:
        objective.micro_batch = size
        # As in an update: its other groups are there too, and the second pass finds gradients of the first.
        place_of_others = torch.empty(others * _bytes(group), dtype=torch.uint8, device=device)
        with activations():
            objective.accumulate([group], [timestep] * 2, step=0, scale=1.0, reference=reference)
        del place_of_others

    for size in sizes_to_try(objective.config.rollout.group_size):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            fits = _has_memory(attempt, size)
        for parameter in objective.policy.trainable().values():
            parameter.grad = None
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        if fits:
            logger.info("micro-batch: %d of the %d samples of a group fit", size, len(group.latents))
            return size
        logger.info("micro-batch: %d samples do not fit", size)
    return None


def _has_memory(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        # Only here: the traceback holds the tensors of the try.
        return False
    return True


def _synthetic(objective: Objective, condition: Condition) -> LiveGroup:
    """A group as large as any: its values are random, and mean nothing."""
    config, policy = objective.config, objective.policy
    size, steps, shape = config.rollout.group_size, len(objective.schedule), policy.latent_shape()
    dtype = next(iter(policy.trainable().values())).dtype
    source = torch.Generator().manual_seed(0)

    def drawn(*dimensions: int) -> Tensor:
        return torch.randn(*dimensions, generator=source).to(policy.device, dtype)

    told = config.objective.needs_trajectory
    return LiveGroup(
        ordinal=0,
        latents=drawn(size, *shape),
        advantages=torch.tensor([1.0, -1.0]).repeat(size)[:size].to(policy.device, dtype),
        condition={name: tensor.to(policy.device) for name, tensor in condition.items()},
        trajectory=drawn(size, steps, *shape) if told else None,
        log_likelihoods=drawn(size, steps - 1) if told else None,
    )


def _bytes(group: LiveGroup) -> int:
    tensors = [group.latents, group.trajectory, group.log_likelihoods, *group.condition.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
