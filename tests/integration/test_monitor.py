"""What the driver says to the queue while a run goes on, on a real queue: state, workers, replicas."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import Watching

from services.config_file import load_config
from services.context import RunContext, SecretPlace
from services.embedded import EmbeddedValkey
from services.group_queue import GroupQueue
from services.messages import Heartbeat, PolicyVersion, WeightsAnnouncement
from services.monitor import LearnerThread, Monitor
from services.ray_metrics import RunMetrics
from services.run_directory import RunDirectory
from services.stop_signals import StopSignals
from services.supervisor import PartFailed, Supervisor
from services.telemetry import Telemetry, read_metrics

pytestmark = pytest.mark.integration
DEADLINE_S = 20.0


class Rig:
    """A monitor without workers, learner and evaluator."""

    def __init__(self, folder: Path, server: EmbeddedValkey) -> None:
        hang = [
            "rollout.hang_s=0.3",
            "learner.hang_s=0.3",
            "rewards.0.deadline_s=0.1",
            "rewards.1.deadline_s=0.1",
        ]
        config = load_config("quickstart", [f"run.directory={folder}", "rollout.workers=2", *hang])
        self.directory = RunDirectory.create(config)
        secret = folder / "password"
        secret.write_text(server.password)
        context = RunContext(
            run=self.directory.name,
            directory=self.directory.root,
            config=config,
            queue_url=server.url,
            queue_password=SecretPlace(file=secret),
        )
        self.queue: GroupQueue = context.open_queue("driver")
        self.queue.want_workers(2)
        self.queue.set_state("running")
        self.restarting: list[str] = []
        self.sizes: list[int] = []
        self.scaled: list[tuple[str, int]] = []
        self.ended: list[tuple[str, str]] = []
        rig = self

        class Workers(Supervisor):
            def resize(self, count: int, begun: Any = ()) -> None:
                rig.sizes.append(count)

            def poll(self, timeout_s: float) -> None:
                """There is none."""

            def end(self, part: str, why: str) -> None:
                rig.ended.append((part, why))

            def restarting(self) -> list[str]:
                return rig.restarting

        self.signals = StopSignals()
        self.monitor = Monitor(
            *(context, self.queue, Telemetry(self.directory.root, tensorboard=False)),
            *(RunMetrics(context.run), Watching(), None),
            Workers(spawn=lambda index: (None, None), count=0, max_restarts=0, on_death=lambda *_: None),
            *(LearnerThread(lambda: None), self.signals, None),
            lambda name, count: self.scaled.append((name, count)),
        )

    def turns(self, done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + DEADLINE_S
        self.monitor._turn()
        while not done():
            assert time.monotonic() < give_up
            self.monitor._turn()

    def told(self) -> tuple[str | None, str]:
        status = self.queue.status()
        return status.state, status.reason

    def forget(self, server: EmbeddedValkey) -> None:
        """The queue server loses all that it has of this run."""
        client = self.queue._client
        client.delete(*client.keys(f"{{dgpo:{self.directory.name}}}:*"))

    def events(self) -> list[str]:
        return [row.what for row in read_metrics(self.directory.root).events]


@pytest.fixture
def rig(tmp_path: Path, valkey: EmbeddedValkey) -> Iterator[Rig]:
    yield Rig(tmp_path, valkey)


def beat(part: str, pid: int) -> Heartbeat:
    return Heartbeat(part=part, state="updating", since=time.time(), pid=pid)


def test_a_run_is_degraded_while_a_worker_is_made_anew_or_a_part_is_silent(rig: Rig) -> None:
    rig.turns(lambda: True)
    assert rig.told() == ("running", "")
    rig.restarting = ["rollout-1"]
    rig.turns(lambda: rig.told() == ("degraded", "rollout-1 died and is made anew"))
    rig.restarting = []
    rig.turns(lambda: rig.told() == ("running", ""))
    rig.queue.beat(beat("rollout-0", 7), 0.05)
    rig.monitor._turn()
    rig.turns(lambda: rig.told() == ("degraded", "no heartbeat of rollout-0"))
    rig.queue.beat(beat("rollout-0", 7), 60)
    rig.turns(lambda: rig.told() == ("running", ""))


def test_a_server_that_has_lost_its_data_is_told_again(rig: Rig, valkey: EmbeddedValkey) -> None:
    rig.queue.want_workers(5)
    rig.queue.want_replicas("ocr", 3)
    rig.restarting = ["rollout-1"]
    rig.turns(lambda: "reward scaled" in rig.events())
    assert rig.scaled == [("ocr", 3)] and rig.sizes[-1] == 5
    rig.forget(valkey)
    rig.turns(lambda: rig.queue.wanted_workers() == 5)
    assert rig.queue.wanted_replicas(["ocr"]) == {"ocr": 3}
    assert rig.told() == ("degraded", "rollout-1 died and is made anew")
    assert rig.scaled == [("ocr", 3)] and rig.sizes[-1] == 5
    rig.signals.requested.set()
    rig.turns(lambda: rig.told()[0] == "draining")
    rig.forget(valkey)
    # Otherwise it would train on, to its end.
    rig.turns(lambda: rig.told()[0] == "draining")


def test_rows_of_a_server_that_lost_its_data_and_whose_clock_went_back_are_read(
    rig: Rig, valkey: EmbeddedValkey
) -> None:
    def row(step: int) -> str:
        values = {
            "epoch": 0,
            "step": step,
            "max_steps": 9,
            "seconds": 1.0,
            "reward_mean": 0.5,
            "reward_std": 0.1,
        }
        return json.dumps({"kind": "update", "time": 1.0, **values})

    def steps() -> list[int]:
        lines = (rig.directory.root / "metrics.jsonl").read_text().splitlines()
        return [found["step"] for found in map(json.loads, lines) if found["kind"] == "update"]

    stream = f"{{dgpo:{rig.directory.name}}}:metrics"
    rig.queue._client.xadd(stream, {"row": row(1)})
    rig.turns(lambda: steps() == [1])
    rig.forget(valkey)
    rig.queue._client.xadd(stream, {"row": row(2)}, id="5-1")
    rig.turns(lambda: steps() == [1, 2])
    rig.queue._client.xadd(stream, {"row": row(3)}, id="5-2")
    rig.turns(lambda: steps() == [1, 2, 3])


def test_a_learner_that_was_started_again_is_told(rig: Rig) -> None:
    rig.queue.beat(beat("learner-0", 7), 60)
    rig.turns(lambda: True)
    assert rig.events() == []
    rig.queue.beat(beat("learner-0", 8), 60)
    rig.turns(lambda: "learner restarted" in rig.events())
    (row,) = read_metrics(rig.directory.root).events
    assert "learner-0: process 8 in place of 7, last seen 'updating'" in row.detail


def silence(rig: Rig, part: str) -> None:
    """Its heartbeat was seen, and there is none any more."""
    rig.queue.beat(beat(part, 7), 60)
    rig.turns(lambda: part in rig.monitor._beats)
    rig.queue._client.delete(f"{{dgpo:{rig.directory.name}}}:hb:{part}")


def test_a_worker_that_stays_silent_is_ended_and_a_new_one_has_its_time(rig: Rig) -> None:
    silence(rig, "rollout-0")
    rig.turns(lambda: rig.ended != [])
    part, why = rig.ended[0]
    assert part == "rollout-0" and re.match(r"no heartbeat for \d+ s; rollout-0: last seen 'updating'", why)
    rig.monitor.worker_died("rollout-0", why)
    (row,) = [row for row in read_metrics(rig.directory.root).events if row.what == "worker died"]
    assert row.detail == f"rollout-0: {why}; last seen 'updating'"
    # It may wait for a place in the cluster for ever.
    waits_for_its_place(rig)
    silence(rig, "rollout-0")
    rig.turns(lambda: rig.ended != [])


def waits_for_its_place(rig: Rig) -> None:
    rig.ended.clear()
    for _ in range(3):
        rig.monitor._silent = {part: since - 100 for part, since in rig.monitor._silent.items()}
        rig.monitor._turn()
    assert rig.ended == []


def test_the_last_heartbeat_of_the_dead_is_none_of_the_next_life(rig: Rig) -> None:
    rig.queue.beat(beat("rollout-0", 7), 60)
    rig.turns(lambda: "rollout-0" in rig.monitor._beats)
    rig.monitor.worker_died("rollout-0", "killed")
    rig.monitor._turn()
    rig.queue._client.delete(f"{{dgpo:{rig.directory.name}}}:hb:rollout-0")
    waits_for_its_place(rig)


def test_a_learner_that_stays_silent_ends_the_run(rig: Rig) -> None:
    silence(rig, "learner-0")
    with pytest.raises(PartFailed, match=r"no heartbeat for \d+ s; learner-0: last seen 'updating' since"):
        rig.turns(lambda: False)


def test_a_worker_that_dies_or_leaves_holds_nothing_and_stands_in_no_line(rig: Rig) -> None:
    weights = WeightsAnnouncement(
        version=PolicyVersion(epoch=0, step=0), kind="policy", digest="0", tensors=1, bytes=4
    )
    rig.queue.begin_epoch(lambda version: weights.model_copy(update={"version": version}), limit=9, window=1)
    assert rig.queue.issue("rollout-0") is not None
    for waits in ("rollout-2", "rollout-1"):
        assert rig.queue.issue(waits) is None
    rig.monitor.worker_left("rollout-2")
    assert rig.queue.status().waiting == 1
    rig.monitor.worker_died("rollout-0", "killed")
    assert (rig.queue.status().leases, rig.queue.status().called) == ((), ("rollout-1",))
    assert rig.events() == ["worker left", "worker died"]
