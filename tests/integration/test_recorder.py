"""Recording the untrained model, with a real queue and a real sampler: each group once, through a restart."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from learner.loop import LearnerLoop
from learner.recorder import UntrainedTrainer, recording
from rollout_workers.loop import RolloutLoop
from rollout_workers.policy_sampler import PolicySampler
from rollout_workers.scoring import GroupScores
from services.context import RunContext, SecretPlace
from services.embedded import EmbeddedValkey
from services.heartbeat import Pulse
from services.messages import PolicyVersion, Prompt, WeightsAnnouncement
from services.prompts import group_task, prompt_source
from services.record import recorder_config
from services.recording import Recording
from services.safetensors_layout import Bytes
from tests.recorded_groups import config, group

pytestmark = pytest.mark.integration

GROUPS = 6


class Store:
    """A transport within one process."""

    def __init__(self) -> None:
        self._payloads: dict[tuple[str, str], Bytes] = {}

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        self._payloads[announcement.kind, str(announcement.version)] = payload.copy()

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        return self._payloads.get((announcement.kind, str(announcement.version)))

    def reclaim(self, kind: str) -> Bytes | None:
        return None

    def close(self) -> None:
        self._payloads.clear()


class Brightness:
    """Scores an image by how bright it is."""

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores:
        return GroupScores(rewards={"ocr": tuple(float(image.mean()) / 255 for image in images)})


def test_every_group_is_recorded_once_and_is_the_untrained_models(
    valkey: EmbeddedValkey, run_name: str, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text(valkey.password)
    own = recorder_config(config("rollout.workers=1"), GROUPS)
    out, store = tmp_path / "out", Store()
    context = RunContext(
        run=run_name,
        directory=tmp_path,
        config=own,
        queue_url=valkey.url,
        queue_password=SecretPlace(file=secret),
        record=out,
    )
    prompts, sampler = prompt_source(own), PolicySampler(own, tmp_path, store)
    queue = context.open_queue("driver")
    worker = RolloutLoop(
        "rollout-0",
        queue,
        sampler,
        Brightness(),
        lambda lease: group_task(own, prompts, run_name, lease.ordinal, lease.attempt, lease.version),
        Pulse("rollout-0", queue.beat),
    )
    thread = threading.Thread(target=worker.run, daemon=True)

    class Killed(Exception):
        pass

    def learn(die_at: int | None) -> int:
        own_queue = context.open_queue("driver")
        trainer = UntrainedTrainer(context, store)
        start = trainer.begin()

        def on_step(row: dict[str, Any]) -> None:
            assert 0 <= row["reward_mean"] <= 1
            if row["step"] == die_at:
                raise Killed

        with recording(context, start) as record:
            LearnerLoop(
                own, own_queue, trainer, Pulse("learner-0", own_queue.beat), on_step=on_step, record=record
            ).run(start)
        return start.step

    thread.start()
    with pytest.raises(Killed):
        learn(die_at=2)
    assert len(Recording.open(out)) == 4
    assert learn(die_at=None) == 2
    queue.set_state("done")
    thread.join(timeout=60)
    assert not thread.is_alive()
    found = Recording.open(out)
    assert [group.ordinal for group in found.groups] == list(range(GROUPS))
    # The worker may have sampled ahead of the death all that was left.
    assert {found.header(place).version.epoch for place in range(GROUPS)} in ({0}, {0, 1})
    # Whatever version a group was sampled with, it is what the model makes as it was loaded.
    fresh = PolicySampler(own, tmp_path, store)
    for place in (0, GROUPS - 1):
        task = group_task(own, prompts, run_name, place, 1, PolicyVersion(epoch=0, step=0))
        made = fresh.sample(task)
        recorded = found.read(place)
        assert recorded.header.seeds == task.seeds
        assert all(torch.equal(recorded.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_groups_that_differ_by_rounding_alone_are_counted_as_in_training(tmp_path: Path) -> None:
    own = recorder_config(config(), 2)
    alike, different = ((0.3, 0.1 + 0.2, 0.3, 0.3), (0.3, 0.4, 0.3, 0.3))
    groups = [group(ordinal, rewards={"ocr": scores}) for ordinal, scores in enumerate((alike, different))]
    trainer: Any = SimpleNamespace(_context=SimpleNamespace(config=own))
    assert UntrainedTrainer.update(trainer, groups, 0)["zero_variance_groups"] == 1
