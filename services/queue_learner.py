"""The learner's side of the group queue: begin an epoch, take the groups of a step, commit the step.

Promises
- `take` returns whole, verified groups that are neither stale nor from the future, in ordinal order.
- `commit` is one script: trained, acknowledged and published together, or not at all.
- A learner that a newer epoch has replaced gets `Fenced`; one whose server lost writes gets `StateLost`.
- Groups that were taken and not committed are delivered again in the next epoch.

One learner process uses one instance; it is not for several threads.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from services.codec import Group
from services.messages import PolicyVersion, WeightsAnnouncement
from services.queue_board import frontier_of
from services.queue_intake import QueueIntake
from services.queue_types import (
    ENDED,
    Frontier,
    QueueError,
    QueueStatus,
    QueueTimeout,
    StateLost,
    Stopped,
)

POLL_S = 0.25
"""Longest single blocking read: how late a stop, a fence or a lost server is noticed."""
log = logging.getLogger(__name__)


class QueueLearner(QueueIntake):
    """What the learner does with the queue."""

    _version: PolicyVersion | None = None

    def begin_epoch(
        self,
        announce: Callable[[PolicyVersion], WeightsAnnouncement],
        *,
        limit: int,
        window: int,
        checkpoint: PolicyVersion | None = None,
        frontier: Frontier | None = None,
        newest_epoch: int = -1,
    ) -> PolicyVersion:
        """Start, or start again from a checkpoint; every later call of an earlier learner is fenced out.

        Args:
            announce: makes the weights fetchable under the version it is given and says so; called before
                any worker hears of that version.
            limit: groups the run trains in all: those of the checkpoint and those of the steps still to make.
            window: ordinals that may be outstanding, (max_staleness + 1) x groups_per_step.
            checkpoint: version of the checkpoint that was loaded; None for a run that starts at step 0.
            frontier: what is resolved according to that checkpoint.
            newest_epoch: highest epoch the caller knows to have begun, for a server that lost its data.

        Returns:
            The new version: a new epoch, at the checkpoint's step.
        """
        if (checkpoint is None) != (frontier is None):
            raise ValueError("begin_epoch needs checkpoint and frontier together, or neither")
        known = checkpoint.epoch if checkpoint else -1
        step = checkpoint.step if checkpoint else 0
        frontier = frontier or Frontier()
        found = self._client.hget(self._keys.key("policy"), "epoch")
        epoch = max(int(found) if found is not None else -1, known, newest_epoch) + 1
        while True:
            version = PolicyVersion(epoch=epoch, step=step)
            announcement = announce(version)
            if announcement.version != version:
                raise ValueError(f"announce was asked for {version} and announced {announcement.version}")
            state = {
                "nonce": uuid.uuid4().hex,
                "proposed": epoch,
                "epoch": known,
                "newest_epoch": newest_epoch,
                "step": step,
                "window": window,
                "limit": limit,
                "max_staleness": self._config.max_staleness,
                "uploads": self._config.max_uploads,
                "kind": announcement.kind,
                "below": frontier.below,
                "above": frontier.above,
                "dead": frontier.dead,
            }
            answer = self._scripts.run("begin", json.dumps(state), announcement.model_dump_json())
            if answer[0] == b"OK":
                break
            epoch = int(answer[1])
        self._version = version
        self._taken = {}
        self._last_seen = b"0-0"
        log.info("epoch begins", extra={"run": self._run, "version": str(version)})
        return version

    def take(self, count: int, deadline_s: float, stop: Callable[[], bool] = lambda: False) -> list[Group]:
        """Wait for `count` valid groups; of those that are there, the lowest ordinals, in ordinal order.

        Taking again before `commit` returns the same groups again where they are still the lowest.

        Raises:
            QueueTimeout: they did not come within `deadline_s`; the text names what is missing.
            Stopped: `stop()` said so, or the run has ended.
            Fenced, StateLost: see the module.
        """
        version = self._at()
        begun = time.monotonic()
        self._drop_stale(version, list(self._taken))
        while True:
            if stop():
                raise Stopped(f"asked to stop with {len(self._taken)} of {count} groups")
            more, state = self._read(version)
            if more:
                continue
            if len(self._taken) >= count:
                return [self._taken[ordinal][1] for ordinal in sorted(self._taken)[:count]]
            if state in ENDED:
                raise Stopped(f"the run is {state}; has {len(self._taken)} of {count} groups")
            waited = time.monotonic() - begun
            if waited >= deadline_s:
                raise QueueTimeout(missing(self.status(), version, waited, len(self._taken), count))
            self._wait(min(POLL_S, deadline_s - waited))

    def commit(self, announcement: WeightsAnnouncement, ordinals: Sequence[int]) -> PolicyVersion:
        """The step is done: these ordinals are trained, and the next version may be sampled with.

        Sending it twice, as a client does whose connection broke, is harmless.
        """
        version = self._at()
        following = PolicyVersion(epoch=version.epoch, step=version.step + 1)
        if announcement.version != following:
            raise ValueError(f"commit at {version} must announce {following}, not {announcement.version}")
        wanted = sorted(set(ordinals))
        if len(wanted) != len(ordinals):
            raise QueueError(f"commit of {following} names an ordinal twice: {sorted(ordinals)}")
        answer = self._scripts.run(
            "commit", version.epoch, version.step, announcement.kind, announcement.model_dump_json(), *wanted
        )
        self._accept(answer, version)
        if answer[0] == b"RESOLVED":
            raise QueueError(f"commit of {following}: ordinal {int(answer[1])} is trained or dead already")
        if answer[0] == b"NOT_QUEUED":
            raise StateLost(f"commit of {following}: ordinal {int(answer[1])} is not in the queue")
        for ordinal in wanted:
            self._taken.pop(ordinal, None)
        self._version = following
        return following

    def announce(self, announcement: WeightsAnnouncement) -> None:
        """Weights beside the policy, the EMA say; a policy is announced by `commit`."""
        version = self._at()
        answer = self._scripts.run(
            "announce", version.epoch, version.step, announcement.kind, announcement.model_dump_json()
        )
        self._accept(answer, version)

    def plan(self, places: Mapping[int, int]) -> None:
        """Say which place of the prompts each ordinal takes that may be issued before the next commit.

        For a run with a curriculum (learner/curriculum.py): call it after `begin_epoch` and before `commit`.
        """
        version = self._at()
        pairs = [number for pair in places.items() for number in pair]
        self._accept(self._scripts.run("plan", version.epoch, version.step, *pairs), version)

    def frontier(self) -> Frontier:
        """Which ordinals are resolved now; of a learner that has begun, at the version that it is at.

        Raises:
            Fenced, StateLost: see the module.
        """
        version = self._version
        if version is None:
            return super().frontier()
        answer = self._scripts.run("frontier", version.epoch, version.step)
        self._accept(answer, version)
        return frontier_of(answer)

    def frontier_after(self, ordinals: Sequence[int]) -> Frontier:
        """The frontier as it will be after the commit of these, for a checkpoint written before it.

        Raises:
            Fenced, StateLost: as `frontier`; the checkpoint must not be written then.
        """
        return self.frontier().with_trained(ordinals)

    def _at(self) -> PolicyVersion:
        if self._version is None:
            raise QueueError("this learner has not begun an epoch: call begin_epoch first")
        return self._version


def missing(status: QueueStatus, version: PolicyVersion, waited_s: float, have: int, count: int) -> str:
    """What a step still waits for, ordinal by ordinal."""
    leased = [
        f"{lease.ordinal} (leased by {lease.worker} for {lease.age_s:.0f} s"
        + (", expired)" if lease.expires_in_s < 0 else ")")
        for lease in sorted(status.leases, key=lambda lease: lease.ordinal)
    ]
    if status.outstanding >= status.window:
        why = "window full"
    elif status.trained + status.outstanding >= status.limit:
        why = f"the run's limit of {status.limit} groups is reached"
    else:
        why = "no worker has asked"
    ahead = range(status.next, status.next + count)
    unissued = [f"{ordinal} (not issued; {why})" for ordinal in (*status.issuable, *ahead)]
    named = (leased + unissued)[: count - have]
    return (
        f"step {version.step + 1} waited {waited_s:.0f} s and has {have} of {count} groups; "
        f"missing: ordinals {', '.join(named)}; queue at {status.version}, "
        f"{status.dead} dead, run {status.state or 'without a state'}"
    )
