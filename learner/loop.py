"""The learner's loop: take the groups of a step, update, publish, record.

Order within a step, and why
1. take: whole groups in ordinal order; recorded, where the run records.
2. update: the only thing that changes the policy.
3. publish: the bytes of the new version are to be had before anyone hears of it.
4. checkpoint, where one is due, with the frontier as it will be after this step: a crash before step 5 then
   resumes behind this step, a crash before step 4 ahead of it; neither trains an ordinal twice. One that is
   written behind the training counts from when it is there, perhaps only after step 5: a crash before that
   resumes from the former one, as it does between two checkpoints.
   With a curriculum, which prompts the next ordinals take is decided before the checkpoint, which has it, and
   told to the workers behind it and ahead of step 5, which lets those ordinals be issued.
5. commit: one transaction acknowledges the groups, records their ordinals as trained and announces the new
   version. No worker can be issued an ordinal of the next step with the old version at max_staleness 0.

Where parts take turns on one card (services/card.py), 2 to 4 are the learner's turn: the groups of the next
step are sampled in the worker's, which begins behind 5.

Promises
- Ends normally when max_steps are done or the run is draining, each time with a checkpoint behind the last
  committed step; any other end is an exception.

Knows no Ray and no torch: the trainer and the publisher are handed in (learner/trainer.py is the real one,
benchmarks/overlap.py a timed wait).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from learner.epochs import NONE, EpochFile
from services.card import OwnCard
from services.codec import Group
from services.config import Config
from services.group_queue import Frontier, GroupQueue, Stopped
from services.heartbeat import Pulse, peak_rss_bytes
from services.messages import PolicyVersion, WeightsAnnouncement

logger = logging.getLogger(__name__)

PASSED_OVER = "checkpoint passed over"
"""What the event is called."""


class Trainer(Protocol):
    """The model side of the learner."""

    def update(self, groups: Sequence[Group], step: int) -> dict[str, Any]:
        """One update from whole groups, in ordinal order; returns the numbers of metrics.jsonl."""
        ...

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        """Make the weights of a version fetchable; `kind` is policy or ema."""
        ...

    def checkpoint(self, version: PolicyVersion, frontier: Frontier) -> None:
        """Write a complete checkpoint, or begin to; nothing is replaced before it is whole."""
        ...

    def finish(self) -> None:
        """Return when every checkpoint is whole."""
        ...


class Curriculum(Protocol):
    """What assigns places of the prompts to ordinals (learner/curriculum.py)."""

    def observe(self, groups: Sequence[Group]) -> None:
        """The groups of an update."""
        ...

    def assign(self, frontier: Frontier) -> int:
        """To all that may be issued before the next commit; returns how many places were left out."""
        ...

    def places(self) -> dict[int, int]:
        """Ordinal -> place."""
        ...


@dataclass(frozen=True)
class Start:
    """Where a learner starts: from nothing, or from a checkpoint."""

    version: PolicyVersion | None = None
    """Of the checkpoint; None when there is none."""
    frontier: Frontier | None = None
    passed_over: tuple[str, ...] = ()
    """What to tell of newer checkpoints, which were not right."""

    @property
    def step(self) -> int:
        return self.version.step if self.version is not None else 0

    @property
    def trained(self) -> int:
        """Groups trained so far; not a multiple of `groups_per_step` where a resume changed that."""
        return self.frontier.trained if self.frontier is not None else 0


class LearnerLoop:
    """One run of the loop, from `start` to the end or to the drain."""

    def __init__(
        self,
        config: Config,
        queue: GroupQueue,
        trainer: Trainer,
        pulse: Pulse,
        *,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        record: Callable[[Sequence[Group]], None] | None = None,
        curriculum: Curriculum | None = None,
        card: OwnCard | None = None,
        epochs: EpochFile | None = None,
    ) -> None:
        self._config = config
        self._queue = queue
        self._trainer = trainer
        self._pulse = pulse
        self._on_step = on_step
        self._record = record
        self._curriculum = curriculum
        self._card = card or OwnCard()
        self._epochs = epochs
        self._checkpointed = -1

    def run(self, start: Start) -> int:
        """Returns the number of updates behind the policy at the end."""
        settings = self._config.learner
        epoch = self._begin(start)
        step = start.step
        groups_done = start.trained
        last = time.monotonic()
        try:
            while step < settings.max_steps:
                row = self._step(epoch, step)
                step += 1
                groups_done += settings.groups_per_step
                now = time.monotonic()
                row |= {
                    "time": time.time(),
                    "epoch": epoch,
                    "step": step,
                    "max_steps": settings.max_steps,
                    "seconds": now - last,
                    "groups": groups_done,
                    "images": groups_done * self._config.rollout.group_size,
                    "groups_per_s": settings.groups_per_step / (now - last),
                    "rss_bytes": peak_rss_bytes(),
                }
                last = now
                self._queue.append_metrics(row)
                if self._on_step is not None:
                    self._on_step(row)
        except Stopped:
            logger.info("draining after step %d", step)
        if self._checkpointed != step:
            self._pulse.enter("checkpointing")
            self._trainer.checkpoint(PolicyVersion(epoch=epoch, step=step), self._queue.frontier())
        self._pulse.enter("finishing the last checkpoint")
        self._trainer.finish()
        return step

    def _begin(self, start: Start) -> int:
        settings, queue = self._config.learner, self._config.queue
        with self._card.turn():
            self._pulse.enter("publishing the first weights")
            version = self._queue.begin_epoch(
                self._announce_first,
                limit=start.trained + max(0, settings.max_steps - start.step) * settings.groups_per_step,
                window=(queue.max_staleness + 1) * settings.groups_per_step,
                checkpoint=start.version,
                frontier=start.frontier,
                newest_epoch=NONE if self._epochs is None else self._epochs.read(),
            )
            if self._curriculum is not None:
                self._curriculum.assign(start.frontier or Frontier())
                self._queue.plan(self._curriculum.places())
            self._queue.announce(self._trainer.publish(version, kind="ema"))
        for detail in start.passed_over:
            row = {"kind": "event", "time": time.time(), "level": "warning", "what": PASSED_OVER}
            self._queue.append_metrics(row | {"detail": detail, "step": start.step})
        self._pulse.version = version
        self._checkpointed = start.step if start.version is not None else -1
        return version.epoch

    def _announce_first(self, version: PolicyVersion) -> WeightsAnnouncement:
        if self._epochs is not None:
            self._epochs.keep(version.epoch)
        return self._trainer.publish(version, kind="policy")

    def _step(self, epoch: int, step: int) -> dict[str, Any]:
        settings = self._config.learner
        clock, opened = PhaseClock(), self._queue.opening_s
        self._pulse.enter(f"waiting for the groups of step {step + 1}", waits=True)
        groups = self._queue.take(
            settings.groups_per_step,
            deadline_s=self._config.groups_deadline_s,
        )
        clock.lap("wait_s")
        clock.move("wait_s", "codec_s", self._queue.opening_s - opened)
        if self._record is not None:
            self._pulse.enter(f"recording the groups of step {step + 1}")
            self._record(groups)
            clock.lap("record_s")
        version = PolicyVersion(epoch=epoch, step=step + 1)
        ordinals = [group.header.ordinal for group in groups]
        with self._card.turn():
            if self._config.cluster.colocate:
                clock.lap("turn_s")
            self._pulse.enter(f"updating to step {step + 1}")
            row = self._trainer.update(groups, step)
            clock.lap("forward_backward_s")
            self._pulse.enter(f"publishing step {step + 1}")
            announcement = self._trainer.publish(version, kind="policy")
            ema = self._trainer.publish(version, kind="ema") if self._evaluates(step + 1) else None
            clock.lap("publish_s")
            if self._curriculum is not None:
                self._curriculum.observe(groups)
                row["prompts_left_out"] = self._curriculum.assign(self._queue.frontier_after(ordinals))
            if self._checkpoints(step + 1):
                self._pulse.enter(f"checkpointing step {step + 1}")
                self._trainer.checkpoint(version, self._queue.frontier_after(ordinals))
                self._checkpointed = step + 1
            clock.lap("checkpoint_s")
        if self._config.cluster.colocate:
            clock.lap("turn_s")
        if self._curriculum is not None:
            self._queue.plan(self._curriculum.places())
        self._queue.commit(announcement, ordinals)
        if ema is not None:
            self._queue.announce(ema)
        self._pulse.version = version
        self._pulse.groups += len(groups)
        clock.lap("commit_s")
        status = self._queue.status()
        staleness = [step - group.header.version.step for group in groups]
        return row | {
            "kind": "update",
            "phases": clock.seconds,
            "staleness_mean": sum(staleness) / len(staleness),
            "staleness_max": max(staleness),
            "staleness": [staleness.count(lag) for lag in range(max(staleness) + 1)],
            "ordinals": ordinals,
            "queue_depth": status.depth,
            "queue_bytes": status.bytes,
            "rollout": {
                "sample_s": sum(g.header.sample_s for g in groups) / len(groups),
                "reward_s": sum(g.header.reward_s for g in groups) / len(groups),
                "overhead_s": sum(g.header.overhead_s for g in groups) / len(groups),
            },
        }

    def _checkpoints(self, step: int) -> bool:
        return step % self._config.checkpoint.every_steps == 0 or step == self._config.learner.max_steps

    def _evaluates(self, step: int) -> bool:
        every = self._config.eval.every_steps
        return (every > 0 and step % every == 0) or step == self._config.learner.max_steps


class PhaseClock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap belongs to this phase."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def move(self, source: str, target: str, seconds: float) -> None:
        """Of what was booked on `source`, this much was `target`."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds
