"""What the group queue says: leases, verdicts, frontiers, its status and its errors.

Promises
- Frozen values, no Redis in here: whoever handles a lease or a verdict imports this and nothing more.
- End and failure are different types: `RunEnded` is the end of the work, everything else is a fault.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from services.messages import Message, PolicyVersion

RunState = Literal["starting", "running", "degraded", "draining", "failed", "done"]
ENDED: tuple[RunState, ...] = ("draining", "failed", "done")


class QueueError(RuntimeError):
    """Something about the queue; the subclasses say what."""


class RunEnded(QueueError):
    """There is no more work to ask for."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the run is {state}: no more ordinals are issued")
        self.state = state


class Fenced(QueueError):
    """Another learner has begun a newer epoch; this one must stop."""


class StateLost(QueueError):
    """The server is not where this learner left it: it lost writes. Begin an epoch from a checkpoint."""


class QueueTimeout(QueueError):
    """The groups of a step did not come in time; the text names what is missing."""


class Stopped(QueueError):
    """The caller's `stop` asked to end the wait."""


class NotAssigned(QueueError):
    """The learner has not said which prompt an ordinal takes: it is about to, or its epoch is over."""


class Admitted(StrEnum):
    """What became of a group."""

    OK = "OK"
    DUP = "DUP"
    """The ordinal is queued, trained or dead already: nothing to do."""
    FULL = "FULL"
    """Depth, bytes or memory are at their bound: the lease is kept, try again in a moment."""
    STALE = "STALE"
    """Sampled too many steps ago; the ordinal will be issued again."""
    OUTSIDE_LINEAGE = "OUTSIDE_LINEAGE"
    """Sampled by a version that the surviving history never had; the ordinal will be issued again."""
    FUTURE = "FUTURE"
    """Claims a version that has not been published."""


class Failed(StrEnum):
    """What becomes of an ordinal that could not be made into a group."""

    RETRY = "RETRY"
    DEAD = "DEAD"


@dataclass(frozen=True)
class Lease:
    """An ordinal issued to a worker, to be renewed before `lease_s` has passed."""

    ordinal: int
    attempt: int
    version: PolicyVersion
    """The policy at the time of issue: sample with it, or with a newer one."""


class Frontier(Message):
    """Which ordinals are resolved (trained or dead), in little space. Goes into checkpoints.

    >>> frontier = Frontier(below=8, above=(10,), dead=(3,))
    >>> frontier.trained
    8
    >>> frontier.with_trained([8, 9])
    Frontier(below=11, above=(), dead=(3,))
    """

    below: int = Field(default=0, ge=0)
    """Every ordinal below this is resolved."""
    above: tuple[int, ...] = ()
    """Resolved ordinals above it, sorted."""
    dead: tuple[int, ...] = ()
    """Those of the resolved ordinals that were given up, sorted."""

    @model_validator(mode="after")
    def _consistent(self) -> Frontier:
        if list(self.above) != sorted(set(self.above)) or (self.above and self.above[0] <= self.below):
            raise ValueError(f"above must be sorted and begin after below={self.below}, got {self.above}")
        if list(self.dead) != sorted(set(self.dead)) or not all(map(self.resolved, self.dead)):
            raise ValueError(f"dead must be sorted and resolved, got {self.dead}")
        return self

    @property
    def trained(self) -> int:
        """How many ordinals are trained."""
        return self.below + len(self.above) - len(self.dead)

    def resolved(self, ordinal: int) -> bool:
        return ordinal < self.below or ordinal in self.above

    def with_trained(self, ordinals: Iterable[int]) -> Frontier:
        """This frontier after these ordinals have been trained too."""
        fresh = set(ordinals)
        if repeated := sorted(filter(self.resolved, fresh)):
            raise ValueError(f"ordinals {repeated} are resolved already")
        return self.of(self.below, fresh.union(self.above), self.dead)

    @classmethod
    def of(cls, below: int, above: Iterable[int], dead: Iterable[int]) -> Frontier:
        """The canonical form: `below` moved up as far as it goes."""
        rest = {ordinal for ordinal in above if ordinal >= below}
        while below in rest:
            rest.remove(below)
            below += 1
        return cls(below=below, above=tuple(sorted(rest)), dead=tuple(sorted(dead)))


@dataclass(frozen=True)
class HeldLease:
    """A lease as the status shows it."""

    ordinal: int
    worker: str
    attempt: int
    version: PolicyVersion
    age_s: float
    expires_in_s: float
    """Negative: expired, and issued again when the next worker asks."""


@dataclass(frozen=True)
class QueueStatus:
    """One consistent look at the queue."""

    state: RunState | None
    reason: str
    """Why the run is in that state, where somebody said so."""
    version: PolicyVersion | None
    depth: int
    """Groups admitted and not yet trained."""
    bytes: int
    queued: tuple[int, ...]
    leases: tuple[HeldLease, ...]
    issuable: tuple[int, ...]
    """The lowest ordinals that wait to be issued again."""
    issuable_count: int
    next: int
    """The lowest ordinal that was never issued."""
    trained: int
    dead: int
    window: int
    """Ordinals that may be outstanding."""
    limit: int
    """Groups that the run trains in all."""
    waiting: int
    """Workers that stand in line for an ordinal."""
    called: tuple[str, ...]
    """Workers whose turn it is, and that have not come yet."""

    @property
    def outstanding(self) -> int:
        """Issued or queued, and not resolved."""
        return self.depth + len(self.leases)
