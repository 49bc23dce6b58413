"""The feeder: in the place of rollout workers where a run trains from a recording.

Promises
- The same loop as a rollout worker's (rollout_workers/loop.py), with the recording as its sampler and scorer:
  ordinals are leased, groups admitted whole, leases renewed, and the end of the run seen in the same way.
- A group enters the queue with what was recorded (tensors, rewards, prompt, seeds) under this run's name, the
  leased ordinal and the policy version of now.
- A recorded group that is damaged is dead-lettered with the name of its shard; it is never trained.

Loads no model and asks no reward server.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rollout_workers.loop import RolloutLoop, SampledGroup, worker_pulse
from rollout_workers.scoring import GroupScores
from services.context import RunContext
from services.group_queue import GroupQueue, Lease
from services.heartbeat import Pulse
from services.logs import configure_logging
from services.messages import GroupHeader, GroupTask, Prompt, WeightsAnnouncement
from services.offline import open_recording, place_of
from services.process_title import show_title
from services.recording import Recording

logger = logging.getLogger(__name__)


class RecordedGroups:
    """A recording as the sampler and the scorer of a rollout loop.

    Args:
        recording: it.
        seed: of the run; the order of later passes follows from it.
    """

    def __init__(self, recording: Recording, seed: int) -> None:
        self._recording, self._seed = recording, seed

    def task(self, run: str, lease: Lease) -> GroupTask:
        """What was recorded for a leased ordinal, as a task of this run."""
        header = self._header(lease.ordinal)
        return GroupTask(
            run=run,
            ordinal=lease.ordinal,
            attempt=lease.attempt,
            place=lease.ordinal,
            prompt=header.prompt,
            seeds=header.seeds,
            version=lease.version,
        )

    def install(self, announcement: WeightsAnnouncement) -> None:
        """Nothing is sampled here, so nothing is installed."""

    def sample(self, task: GroupTask) -> SampledGroup:
        """The recorded tensors; their images are not kept.

        Raises:
            CorruptGroup: not what was recorded; the shard is named.
        """
        group = self._recording.read(place_of(self._seed, task.ordinal, len(self._recording)))
        return SampledGroup(tensors=group.tensors, images=np.empty((0, 0, 0, 3), dtype=np.uint8))

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores:
        """The recorded scores."""
        assert ordinal is not None  # None is an evaluation, and those are never recorded
        header = self._header(ordinal)
        return GroupScores(rewards=header.rewards, details=header.details)

    def _header(self, ordinal: int) -> GroupHeader:
        return self._recording.header(place_of(self._seed, ordinal, len(self._recording)))


def feeder_loop(
    worker: str, queue: GroupQueue, run: str, recording: Recording, seed: int, pulse: Pulse
) -> RolloutLoop:
    """A rollout loop that feeds a queue from a recording."""
    groups = RecordedGroups(recording, seed)
    return RolloutLoop(worker, queue, groups, groups, lambda lease: groups.task(run, lease), pulse)


class Feeder:
    """The Ray actor; one a run, for reading is not what an update waits for.

    Args:
        context: RunContext as JSON.
        index: of the feeder in the run.
    """

    def __init__(self, context: str, index: int) -> None:
        self._context = RunContext.model_validate_json(context)
        self._name = f"feeder-{index}"
        configure_logging(self._name, self._context.directory, run=self._context.run)
        torch.set_num_threads(1)

    def run(self) -> int:
        """Work until the run ends; returns the groups admitted."""
        context, config = self._context, self._context.config
        queue = context.open_queue("worker")
        with worker_pulse(self._name, queue, config, show=show_title) as pulse:
            pulse.enter("opening the recording")
            try:
                recording = open_recording(config)
                return feeder_loop(self._name, queue, context.run, recording, config.run.seed, pulse).run()
            except Exception:
                logger.exception("%s failed", self._name)
                raise
