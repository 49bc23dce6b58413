"""How many groups a learner asks the queue for, wherever it starts; and what it tells of the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from learner.epochs import EpochFile
from learner.loop import LearnerLoop, Start
from services.config import Config
from services.config_file import ConfigError, load_config
from services.group_queue import Frontier, Stopped
from services.heartbeat import Pulse
from services.messages import PolicyVersion, WeightsAnnouncement
from services.metrics import EventRow, row_of


class Trainer:
    """Publishes nothing, trains nothing."""

    def __init__(self) -> None:
        self.checkpoints: list[int] = []
        self.finished = 0

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        return WeightsAnnouncement.model_validate(
            {"version": version, "kind": kind, "digest": "none", "tensors": 1, "bytes": 4}
        )

    def update(self, groups: Any, step: int) -> dict[str, Any]:
        raise AssertionError("there is nothing to train on")

    def checkpoint(self, version: PolicyVersion, frontier: Frontier) -> None:
        self.checkpoints.append(version.step)

    def finish(self) -> None:
        self.finished = len(self.checkpoints)


class Queue:
    """Remembers how the epoch began, then drains."""

    opening_s = 0.0

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def begin_epoch(self, announce: Any, **began: Any) -> PolicyVersion:
        self.began = began
        checkpoint = began["checkpoint"]
        version = PolicyVersion(epoch=1, step=checkpoint.step if checkpoint else 0)
        announce(version)
        return version

    def announce(self, announcement: WeightsAnnouncement) -> None:
        pass

    def take(self, count: int, *, deadline_s: float) -> list[Any]:
        raise Stopped("draining")

    def frontier(self) -> Frontier:
        return Frontier()

    def append_metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def limit(config: Config, start: Start, queue: Any = None) -> int:
    queue = queue or Queue()
    trainer = Trainer()
    LearnerLoop(config, queue, trainer, Pulse("learner-0", lambda beat: None)).run(start)
    # Behind the last step there is a checkpoint, and the loop does not end before it is whole.
    assert trainer.finished == len(trainer.checkpoints) == (0 if start.version is not None else 1)
    found: int = queue.began["limit"]
    return found


def test_a_queue_server_that_has_lost_its_data_is_told_of_the_newest_epoch(tmp_path: Path) -> None:
    """It is in the run directory before its first weights are published."""

    class Keeps(Trainer):
        def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
            assert EpochFile(tmp_path).read() == version.epoch
            return super().publish(version, kind=kind)

    told = []
    for _ in range(2):
        queue: Any = Queue()
        pulse = Pulse("learner-0", lambda beat: None)
        LearnerLoop(load_config("quickstart"), queue, Keeps(), pulse, epochs=EpochFile(tmp_path)).run(Start())
        told.append(queue.began["newest_epoch"])
    assert told == [-1, 1]
    EpochFile(tmp_path).keep(0)
    assert EpochFile(tmp_path).read() == 1
    (tmp_path / "epoch.json").write_text("{")
    with pytest.raises(ConfigError, match=r"epoch\.json: unreadable"):
        EpochFile(tmp_path).read()


@pytest.mark.parametrize("groups_per_step", [2, 4, 16])
def test_a_resume_with_other_steps_gets_the_groups_it_needs(groups_per_step: int) -> None:
    """Six steps of four groups are behind it, one ordinal was given up."""
    config = load_config("quickstart", ["learner.max_steps=10", f"learner.groups_per_step={groups_per_step}"])
    frontier = Frontier(below=25, dead=(3,))
    start = Start(version=PolicyVersion(epoch=0, step=6), frontier=frontier)
    assert limit(config, start) == 24 + 4 * groups_per_step
    assert limit(config, Start()) == 10 * groups_per_step


def test_a_run_that_is_already_further_asks_for_nothing() -> None:
    config = load_config("quickstart", ["learner.max_steps=2"])
    start = Start(version=PolicyVersion(epoch=0, step=6), frontier=Frontier(below=48))
    assert limit(config, start) == 48


def test_checkpoints_that_were_passed_over_are_events_of_the_run() -> None:
    told = ("step-8: torn", "step-7: torn")
    start = Start(version=PolicyVersion(epoch=0, step=6), frontier=Frontier(below=48), passed_over=told)
    queue = Queue()
    limit(load_config("quickstart"), start, queue)
    rows = [row_of(row) for row in queue.rows]
    assert all(isinstance(row, EventRow) for row in rows)
    assert [(row.what, row.level, row.step, row.detail) for row in rows if isinstance(row, EventRow)] == [
        ("checkpoint passed over", "warning", 6, text) for text in told
    ]
