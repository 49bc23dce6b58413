"""`dgpo status`: of a live queue server of a run directory, and when it is gone."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from services.cli import app, main
from services.config_file import load_config
from services.embedded import EmbeddedValkey
from services.group_queue import GroupQueue, connect
from services.messages import Heartbeat, PolicyVersion, WeightsAnnouncement
from services.metrics import row_of
from services.queue_types import RunState
from services.run_directory import RunDirectory
from services.status import drawn, run_status
from services.telemetry import Telemetry

pytestmark = pytest.mark.integration

Dgpo = Callable[..., tuple[int | str | None, str]]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(load_config("quickstart", [f"run.directory={tmp_path}"]))


@pytest.fixture
def queue(run: RunDirectory) -> Iterator[GroupQueue]:
    with EmbeddedValkey(run.queue) as server:
        yield GroupQueue(connect(server.url, server.password), run.name, run.config().queue)


def beat(part: str, state: str) -> Heartbeat:
    return Heartbeat(part=part, state=state, since=1000.0, ordinal=3, groups=2, pid=7, node="here")


def weights(version: PolicyVersion) -> WeightsAnnouncement:
    return WeightsAnnouncement(version=version, digest="d", tensors=1, bytes=1)


def text_of(run: RunDirectory) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(drawn(run_status(run), now=1065.0))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_what_every_part_does_is_told_and_who_is_silent(run: RunDirectory, queue: GroupQueue) -> None:
    queue.set_state("running")
    queue.begin_epoch(weights, limit=64, window=16)
    assert queue.issue("rollout-0") is not None
    queue.beat(beat("learner-0", "waiting for groups"), 60)
    queue.beat(beat("rollout-0", "[red]sampling"), 60)
    found = run_status(run)
    assert (found.state, found.silent, found.version) == ("running", (), PolicyVersion(epoch=0, step=0))
    assert found.flow is not None
    assert (found.flow.issued, found.flow.depth, found.flow.window, found.flow.of) == (1, 0, 16, 64)
    shown = text_of(run)
    assert "waiting for groups (ordinal 3)  1:05" in shown
    assert "[red]sampling" in shown, "text of a part is no markup"

    queue.beat(beat("rollout-1", "installing"), 0.001)
    give_up = time.monotonic() + 10
    while queue.heartbeats()["rollout-1"] is not None:
        assert time.monotonic() < give_up
    assert (run_status(run).state, run_status(run).silent) == ("degraded", ("rollout-1",))
    assert "no heartbeat of rollout-1" in text_of(run)
    queue.set_state("failed", "rollout-1 died 5 times")
    assert "rollout-1 died 5 times" in text_of(run)


@pytest.fixture
def dgpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dgpo:
    """A command's arguments -> its exit code, and what it says to people."""

    def command(*arguments: object) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["dgpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return command


def test_what_is_wanted_is_told_to_the_driver(run: RunDirectory, queue: GroupQueue, dgpo: Dgpo) -> None:
    queue.set_state("degraded")
    code, said = dgpo("scale", run.root, "--workers", 3, "--replicas", "ocr=4")
    assert code == 0 and "wanted: 3 workers, 4 of reward ocr" in said
    assert (queue.wanted_workers(), queue.wanted_replicas(["ocr", "tesseract"])) == (3, {"ocr": 4})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "nothing to do"),
        ("--workers 0", "Invalid value for '--workers'"),
        ("--workers -2", "Invalid value for '--workers'"),
        ("--replicas ocr", "give REWARD=N"),
        ("--workers 3 --replicas ocr=0", "N from 1 on"),
        ("--workers 3 --replicas ocr=-2", "N from 1 on"),
        (
            "--workers 3 --replicas ocr=2 --replicas beauty=2",
            "'beauty' is none that the run has started; those are: ocr, tesseract",
        ),
    ],
)
def test_what_cannot_be_wanted_is_named_and_changes_nothing(
    run: RunDirectory, queue: GroupQueue, dgpo: Dgpo, arguments: str, named: str
) -> None:
    queue.set_state("running")
    code, said = dgpo("scale", run.root, *arguments.split())
    assert code == 2 and named in said
    assert queue.wanted_workers() is None and queue.wanted_replicas(["ocr", "tesseract"]) == {}


def test_one_card_is_for_one_worker(tmp_path: Path, dgpo: Dgpo) -> None:
    shared = ("cluster.colocate=true", "queue.max_staleness=0", "rollout.workers=1")
    run = RunDirectory.create(load_config("quickstart", [f"run.directory={tmp_path}", *shared]))
    with EmbeddedValkey(run.queue) as server:
        queue = GroupQueue(connect(server.url, server.password), run.name, run.config().queue)
        queue.set_state("running")
        code, said = dgpo("scale", run.root, "--workers", 2)
        assert code == 2 and "cluster.colocate: the card is for one rollout worker, not 2" in said
        assert queue.wanted_workers() is None


@pytest.mark.parametrize("state", ["draining", "done", "failed", None])
def test_only_a_run_that_goes_on_is_scaled(
    run: RunDirectory, queue: GroupQueue, dgpo: Dgpo, state: RunState | None
) -> None:
    if state is not None:
        queue.set_state(state)
    code, said = dgpo("scale", run.root, "--workers", 3, "--replicas", "ocr=4")
    assert code == 2 and f"the run is {state or 'not there'}; only one that goes on is scaled" in said
    assert queue.wanted_workers() is None and queue.wanted_replicas(["ocr"]) == {}


@pytest.mark.parametrize("over", [False, True])
def test_a_run_that_is_over_or_has_stopped_is_not_scaled(run: RunDirectory, dgpo: Dgpo, over: bool) -> None:
    most = run.config().learner.max_steps
    row = {"kind": "update", "time": 1.0, "epoch": 0, "step": most if over else 1, "max_steps": most}
    with Telemetry(run.root, tensorboard=False) as telemetry:
        telemetry.write(row_of(row | {"seconds": 1.0, "reward_mean": 0.5, "reward_std": 0.1}))
    code, said = dgpo("scale", run.root, "--workers", 3)
    assert code == 2
    assert f"the run is {'done' if over else 'stopped'}, its queue hears nothing: " in said
    assert (f"go on with: dgpo train --resume {run.root}" in said) is not over


def test_a_run_from_a_recording_has_no_workers_to_scale(tmp_path: Path, dgpo: Dgpo) -> None:
    offline = RunDirectory.create(load_config("offline", [f"run.directory={tmp_path}"]))
    code, said = dgpo("scale", offline.root, "--workers", 3)
    assert code == 2 and "it trains from a recording, by one feeder; there is nothing to scale" in said


def test_looking_changes_nothing_and_a_driver_is_told(run: RunDirectory, queue: GroupQueue) -> None:
    assert run_status(run).driver is None
    with run.locked():
        assert run_status(run).driver == os.getpid()
    # Had a look kept the lock, the next driver would be refused.
    with run.locked():
        assert run_status(run).driver == os.getpid()
    assert run_status(run).driver is None


def test_a_run_that_has_stopped_says_how_to_go_on(run: RunDirectory) -> None:
    said = CliRunner().invoke(app, ["status", str(run.root), "--json"])
    assert said.exit_code == 0
    told = json.loads(said.stdout.splitlines()[-1])
    assert (told["state"], told["step"], told["parts"]) == ("stopped", 0, [])
    assert f"dgpo train --resume {run.root}" in told["reason"]
