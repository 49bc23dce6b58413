"""What a rollout worker does all day: lease an ordinal, sample its group, have it scored, admit it whole.

Promises
- Weights are installed between groups, never inside one; an install is proven (digest, bound tensors and
  the velocity probe) before the first group is sampled with it.
- While a group is being scored the next one is being sampled; at most one group waits for its scores.
- A group that cannot be had, or its scores cannot, is given back with the reason, and nothing of it reaches
  the learner.
- Where parts take turns on one card, this one has its turn from the first group of a step to the last.
- A lease is renewed while its group is alive, for `rollout.hang_s` at most; the loop ends by `RunEnded` only:
  anything else is a failure.

Sampler and scorer are handed in: rollout_workers/worker.py binds the real ones, benchmarks/overlap.py waits
of a measured length.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from reward_servers.client import RewardError
from rollout_workers.scoring import GroupScores, Scorer
from services.card import OwnCard
from services.codec import CorruptGroup, encode_group
from services.config import Config
from services.group_queue import Admitted, GroupQueue, Lease, NotAssigned, RunEnded
from services.heartbeat import BEATS_TO_LIVE, Pulse, Show, unshown
from services.messages import GroupHeader, GroupTask, PolicyVersion, WeightsAnnouncement
from services.policy_store import WeightsGone
from services.queue_types import ENDED

logger = logging.getLogger(__name__)

FULL_RETRY_S = 0.2


@dataclass(frozen=True)
class SampledGroup:
    """What a sampler makes of a group task."""

    tensors: dict[str, torch.Tensor]
    """`latents` (G, C, h, w) and `condition.*` of one sample: the payload of the group."""
    images: NDArray[np.uint8]
    """(G, H, W, 3), in the order of the seeds."""


class Sampler(Protocol):
    """The model side of a worker."""

    def install(self, announcement: WeightsAnnouncement) -> float | None:
        """Fetch, verify and bind a version; raises when fewer tensors bind than were published.

        Returns the error of the velocity probe, None where nothing was compared.
        """
        ...

    def sample(self, task: GroupTask) -> SampledGroup:
        """The group of a task; raises CorruptGroup where it cannot be had, by this worker or another."""
        ...


TaskOf = Callable[[Lease], GroupTask]
KeepImages = Callable[[GroupTask, SampledGroup, GroupScores], None]


def worker_pulse(worker: str, queue: GroupQueue, config: Config, show: Show = unshown) -> Pulse:
    """The heartbeat of a worker, which renews its leases too."""
    ttl = BEATS_TO_LIVE * config.telemetry.heartbeat_s
    return Pulse(
        worker,
        lambda beat: queue.beat(beat, ttl),
        lambda ordinal: queue.renew(worker, ordinal),
        every_s=min(config.telemetry.heartbeat_s, config.queue.lease_s / 3),
        hang_s=config.rollout.hang_s,
        show=show,
    )


class RolloutLoop:
    """One worker's loop over a queue."""

    def __init__(
        self,
        worker: str,
        queue: GroupQueue,
        sampler: Sampler,
        scorer: Scorer,
        task_of: TaskOf,
        pulse: Pulse,
        *,
        poll_s: float = 1.0,
        keep_images: KeepImages | None = None,
        unwanted: Callable[[], bool] = lambda: False,
        card: OwnCard | None = None,
    ) -> None:
        self.worker = worker
        self._queue = queue
        self._sampler = sampler
        self._scorer = scorer
        self._task_of = task_of
        self._pulse = pulse
        self._poll_s = poll_s
        self._keep_images = keep_images
        self._unwanted = unwanted
        self._card = card or OwnCard()
        self.dismissed = False
        """Whether `run` has ended because nobody wanted this worker any more."""
        self._installed: PolicyVersion | None = None
        self._overhead_s = 0.0
        self._scoring: Future[None] | None = None
        self._waits_for_scores = False
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score")

    def run(self) -> int:
        """Work until the run ends, or nobody wants this worker any more.

        Returns:
            Groups admitted.

        Raises:
            WeightsMismatch, VelocityDrift, QueueUnreachable, ...: whatever the loop cannot go on from.
        """
        try:
            while not self._unwanted():
                self._turn()
            self.dismissed = True
            self._card.give()
            self._settle()
            logger.info("one worker too many: ends after %d groups", self._pulse.groups)
            return self._pulse.groups
        except RunEnded as ended:
            self._card.give()
            self._settle()
            logger.info("run is %s after %d groups", ended.state, self._pulse.groups)
            return self._pulse.groups
        finally:
            self._background.shutdown(wait=False, cancel_futures=True)

    def _turn(self) -> None:
        asked = time.monotonic()
        lease = self._queue.issue(self.worker)
        if lease is None:
            self._card.give()
            self._pulse.enter("waiting for an ordinal", waits=True)
            # A failure of the scoring thread must not hide behind an idle queue.
            if self._scoring is not None and self._scoring.done():
                self._settle()
            self._queue.wait_for_work(self._poll_s)
            return
        self._pulse.hold(lease.ordinal)
        issue_s = time.monotonic() - asked
        self._card.take()
        started = time.monotonic()
        try:
            self._update_weights(lease)
            assert self._installed is not None
            task = self._task_of(replace(lease, version=self._installed))
        except (WeightsGone, NotAssigned) as error:
            # Their publisher died, and a new epoch will announce others; or it has begun, and the ordinal was
            # of the old one.
            logger.warning("ordinal %d given back: %s", lease.ordinal, error)
            self._queue.release(self.worker, lease.ordinal)
            self._pulse.let_go(lease.ordinal)
            self._card.give()
            what = "weights" if isinstance(error, WeightsGone) else "a prompt"
            self._pulse.enter(f"waiting for {what}", waits=True)
            # Not `wait_for_work`: what was given back wakes everyone who waits there, this worker too.
            time.sleep(self._poll_s)
            return
        self._overhead_s += issue_s + time.monotonic() - started
        self._pulse.enter("sampling", ordinal=task.ordinal)
        started = time.monotonic()
        try:
            sampled = self._sampler.sample(task)
        except CorruptGroup as error:
            outcome = self._queue.fail(self.worker, task.ordinal, f"{type(error).__name__}: {error}")
            logger.warning("ordinal %d not to be had (%s): %s", task.ordinal, outcome, error)
            self._pulse.let_go(task.ordinal)
            return
        sample_s = time.monotonic() - started
        if self._scoring is not None and not self._scoring.done():
            self._pulse.enter("waiting for scores", ordinal=task.ordinal)
        self._waits_for_scores = True
        self._settle()
        self._waits_for_scores = False
        self._scoring = self._background.submit(self._score_and_admit, task, sampled, sample_s)

    def _update_weights(self, lease: Lease) -> None:
        if self._installed is not None and self._installed >= lease.version:
            return
        announcement = self._queue.latest("policy")
        if announcement is None or announcement.version < lease.version:
            raise RuntimeError(
                f"ordinal {lease.ordinal} is to be sampled with version {lease.version}, but the newest "
                f"announced is {announcement.version if announcement else 'none'}"
            )
        self._pulse.enter("installing weights", ordinal=lease.ordinal)
        began = time.monotonic()
        error = self._sampler.install(announcement)
        self._pulse.install_s = time.monotonic() - began
        if error is not None:
            self._pulse.probe_error = error
        self._installed = announcement.version
        self._pulse.version = announcement.version

    def _score_and_admit(self, task: GroupTask, sampled: SampledGroup, sample_s: float) -> None:
        try:
            started = time.monotonic()
            try:
                scores = self._scorer.score(
                    sampled.images, [task.prompt] * len(task.seeds), ordinal=task.ordinal
                )
            except RewardError as error:
                outcome = self._queue.fail(self.worker, task.ordinal, f"{type(error).__name__}: {error}")
                logger.warning("ordinal %d not scored (%s): %s", task.ordinal, outcome, error)
                return
            header = GroupHeader(
                run=task.run,
                ordinal=task.ordinal,
                attempt=task.attempt,
                version=task.version,
                prompt=task.prompt,
                seeds=task.seeds,
                rewards=scores.rewards,
                details=scores.details,
                worker=self.worker,
                sample_s=sample_s,
                reward_s=time.monotonic() - started,
                overhead_s=self._overhead_s,
            )
            self._overhead_s, started = 0.0, time.monotonic()
            admitted = self._admit(header, sampled.tensors)
            self._overhead_s += time.monotonic() - started
            if admitted and self._keep_images is not None:
                self._keep_images(task, sampled, scores)
        finally:
            self._pulse.let_go(task.ordinal)

    def _admit(self, header: GroupHeader, tensors: dict[str, torch.Tensor]) -> bool:
        encoded = encode_group(header, tensors)
        # The window keeps the queue below its bounds; a full one means that it is bounded too tightly or
        # shared. The lease is renewed meanwhile, so waiting loses nothing.
        while (answer := self._queue.admit(encoded)) is Admitted.FULL:
            if self._waits_for_scores:  # else the worker is at something else, which may hang
                self._pulse.enter("waiting for room in the queue", ordinal=header.ordinal, waits=True)
            if self._queue.state() in ENDED:
                return False
            time.sleep(FULL_RETRY_S)
        if answer is Admitted.FUTURE:
            raise RuntimeError(f"group {header.ordinal} was sampled with the unannounced {header.version}")
        if answer is not Admitted.OK:
            logger.info("group %d not admitted: %s", header.ordinal, answer.name)
            return False
        self._pulse.groups += 1
        return True

    def _settle(self) -> None:
        if self._scoring is not None:
            self._scoring.result()
            self._scoring = None
