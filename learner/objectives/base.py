"""What an objective is: it adds the gradient of its loss, for some groups and timesteps, to the parameters.

Promises
- An objective sees whole groups, and says nothing of how they came here.
- Adding one is adding one file to this folder that declares `OBJECTIVES`, name -> class, and its name to
  services/config/objectives.py `ObjectiveConfig`.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from policy.base import Condition, Policy
from policy.schedule import Schedule
from services.config import Config


@dataclass(frozen=True)
class TrainingGroup:
    """One whole group, as it came from a rollout worker."""

    ordinal: int
    latents: Tensor
    """(G, C, h, w) final latents x0."""
    rewards: Mapping[str, Sequence[float]]
    """Name -> G scores, in the order of the latents; held-out rewards too."""
    condition: Condition
    """Of the group's prompt."""
    sampled_at: int | None = None
    """Updates behind the weights that sampled it; None: those of now."""
    trajectory: Tensor | None = None
    """(G, steps, C, h, w) where the objective needs it: rollout_workers/solvers.py `Trajectory`."""
    log_likelihoods: Tensor | None = None
    """(G, steps - 1) of its steps under the policy that sampled it."""


@dataclass(frozen=True)
class LiveGroup:
    """A group that has a preference, on the policy's device."""

    ordinal: int
    latents: Tensor
    """(G, C, h, w), in the dtype of the trained parameters (float32)."""
    advantages: Tensor
    """(G,), the same dtype."""
    condition: Condition
    sampled_at: int | None = None
    trajectory: Tensor | None = None
    log_likelihoods: Tensor | None = None


class Phases:
    """Seconds by phase. On a GPU it is the time to launch the work, except where a phase waits for it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


@dataclass
class Measurements:
    """Sums over (group, timestep) pairs; means are taken when an update is reported."""

    pairs: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, pairs: int, **sums: Tensor) -> None:
        self.pairs += pairs
        for name, value in sums.items():
            value = value.detach().to(torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean(self, name: str) -> float | None:
        return float(self.sums[name]) / self.pairs if name in self.sums and self.pairs else None


@dataclass(frozen=True)
class OptimizerStep:
    """What all gradients of one optimizer step have in common; see `Objective.accumulate`."""

    step: int
    scale: float
    reference: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Idle:
    """Passes that a rank makes because others make them, behind its own at each timestep."""

    group: LiveGroup
    """What they are made of. They give a gradient of exactly zero, and are not measured."""
    passes: int


class Objective(ABC):
    """A training objective.

    Args:
        policy: whose trained parameters get gradients.
        config: of the run.
        schedule: the solver's timesteps and sigmas, to which timestep indices refer.
    """

    def __init__(self, policy: Policy, config: Config, schedule: Schedule) -> None:
        self.policy = policy
        self.config = config
        self.schedule = schedule
        self.phases = Phases()
        chosen = config.learner.micro_batch
        self.micro_batch: int | None = None if chosen == "auto" else chosen
        """Samples in one forward-backward: a multiple or a divisor of the group size. None: `auto` is not
        settled yet (learner/micro_batch.py)."""

    @property
    def at_once(self) -> int:
        """The micro-batch.

        Raises:
            RuntimeError: it is not settled yet.
        """
        if self.micro_batch is None:
            raise RuntimeError("learner.micro_batch auto is not settled: no update can be made yet")
        return self.micro_batch

    @property
    def sharded(self) -> bool:
        """Whether gradients leave a rank as they are made, so that nothing can be done to them afterwards."""
        return self.policy.shards is not None

    def backward(self, loss: Tensor) -> None:
        with self.phases("backward"):
            loss.backward()  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def uses_reference(self) -> bool:
        """Whether the learner must keep the EMA reference for this objective."""

    def accumulate(
        self,
        groups: Sequence[LiveGroup],
        timesteps: Sequence[int],
        *,
        step: int,
        scale: float,
        reference: Mapping[str, Tensor] | None,
        idle: Idle | None = None,
    ) -> Measurements:
        """Add the gradient of scale * sum over groups and timesteps of the loss to `.grad`.

        Args:
            groups: with a preference each, in ordinal order.
            timesteps: indices into the schedule.
            step: the update; noise follows from it.
            scale: one over the number of pairs in the whole optimizer step, counting groups without a
                preference too.
            reference: tensors of the EMA reference; None: it equals the policy as it is now.
            idle: passes to make beside those of `groups`.
        """
        shared, measured = OptimizerStep(step, scale, reference), Measurements()
        for index in timesteps:
            for start in range(0, len(groups), self._groups_at_once):
                self._add(groups[start : start + self._groups_at_once], index, shared, measured)
            for _ in range(idle.passes if idle is not None else 0):
                assert idle is not None
                self._add([idle.group], index, replace(shared, scale=0.0), Measurements())
        return measured

    def passes(self, groups: int) -> int:
        """How often so many groups go through the model at each timestep, each time by the same sequence of
        forward and backward passes."""
        return -(-groups // self._groups_at_once)

    @property
    def _groups_at_once(self) -> int:
        return max(1, self.at_once // self.config.rollout.group_size)

    @abstractmethod
    def _add(
        self, groups: Sequence[LiveGroup], index: int, shared: OptimizerStep, measured: Measurements
    ) -> None:
        """Add the gradient of some groups at one timestep: several that fit a micro-batch, or one."""


class Batch(Protocol):
    """What an objective makes of whole groups at one timestep."""

    def part(self, samples: slice) -> Self:
        """Some of the samples."""
        ...


BatchT = TypeVar("BatchT", bound=Batch)


class SamplewiseObjective(Objective, Generic[BatchT]):
    """An objective whose loss is a sum over samples, so that any of them may share a forward pass."""

    @abstractmethod
    def _batch(self, groups: Sequence[LiveGroup], index: int, step: int) -> BatchT:
        """Whole groups at one timestep."""

    @abstractmethod
    def _part(self, batch: BatchT, advantages: Tensor, shared: OptimizerStep) -> dict[str, Tensor]:
        """Add the gradient of some samples; returns what is measured of them, summed."""

    def _add(
        self, groups: Sequence[LiveGroup], index: int, shared: OptimizerStep, measured: Measurements
    ) -> None:
        batch = self._batch(groups, index, shared.step)
        advantages = torch.cat([group.advantages for group in groups])
        sums: dict[str, Tensor] = {}
        for samples in slices(len(advantages), self.at_once):
            part = self._part(batch.part(samples), advantages[samples], shared)
            sums = {name: sums.get(name, 0) + value for name, value in part.items()}
        group_size = self.config.rollout.group_size
        measured.add(len(groups), **{name: value / group_size for name, value in sums.items()})


def slices(count: int, size: int) -> list[slice]:
    """`count` samples in pieces of `size`."""
    return [slice(start, start + size) for start in range(0, count, size)]


def make_objective(policy: Policy, config: Config, schedule: Schedule) -> Objective:
    """The objective named in the configuration."""
    return objectives()[config.objective.name](policy, config, schedule)


def objectives() -> dict[str, type[Objective]]:
    """Every objective in this folder, by name."""
    from learner import objectives as folder

    found: dict[str, type[Objective]] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        loaded = importlib.import_module(f"{folder.__name__}.{module.name}")
        found.update(getattr(loaded, "OBJECTIVES", {}))
    return found
