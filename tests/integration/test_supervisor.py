"""Supervision of real actors: who is made anew, and when the run ends instead."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from policy.errors import PolicyError
from services.supervisor import PartFailed, Supervisor

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local")]


@ray.remote(num_cpus=0)
class Failing:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self) -> None:
        raise self._error


def supervise(*errors: Exception, max_restarts: int) -> tuple[list[int], str]:
    """With an error for each life of a worker: the indices of all made, and what the run ended with."""
    made: list[int] = []

    def spawn(index: int) -> tuple[Any, Any]:
        worker = Failing.remote(errors[min(len(made), len(errors) - 1)])
        made.append(index)
        return worker, worker.run.remote()

    supervisor = Supervisor(spawn, count=1, max_restarts=max_restarts, on_death=lambda part, why: None)
    supervisor.start()
    deadline = time.monotonic() + 60
    with pytest.raises(PartFailed) as failed:
        while time.monotonic() < deadline:
            supervisor.poll(0.1)
    return made, str(failed.value)


def test_a_crash_is_made_anew_within_the_budget() -> None:
    made, said = supervise(RuntimeError("the card fell off"), max_restarts=1)
    assert made == [0, 0]
    assert "rollout-0 died 2 times" in said
    assert "RuntimeError: the card fell off" in said


def test_what_no_restart_mends_ends_the_run_at_once() -> None:
    made, said = supervise(PolicyError("no model_index.json in /models/none"), max_restarts=5)
    assert made == [0]
    assert "rollout-0 cannot work: PolicyError: no model_index.json in /models/none" in said
    assert "logs/rollout-0.log" in said


def test_a_worker_that_was_made_anew_keeps_its_budget() -> None:
    made, said = supervise(RuntimeError("node lost"), PolicyError("no model here"), max_restarts=2)
    assert made == [0, 0, 0]
    assert "rollout-0 died 3 times" in said


@ray.remote(num_cpus=0)
class Stopped:
    """Its first life does not end, and does nothing any more: its process is stopped."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def run(self) -> None:
        if self._marker.exists():
            return
        self._marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_worker_whose_process_is_stopped_is_killed_and_made_anew(tmp_path: Path) -> None:
    marker, made, died = tmp_path / "pid", list[int](), list[tuple[str, str]]()

    def spawn(index: int) -> tuple[Any, Any]:
        worker = Stopped.remote(marker)
        made.append(index)
        return worker, worker.run.remote()

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (made, died)
            supervisor.poll(0.05)

    supervisor = Supervisor(
        spawn, count=1, max_restarts=1, on_death=lambda part, why: died.append((part, why))
    )
    supervisor.start()
    until(lambda: marker.exists() and marker.read_text() != "")
    process = psutil.Process(int(marker.read_text()))
    until(lambda: process.status() == psutil.STATUS_STOPPED)
    supervisor.end("rollout-0", "no heartbeat for 9 s")
    until(lambda: made == [0, 0])
    assert died == [("rollout-0", "no heartbeat for 9 s")]
    until(lambda: not process.is_running())
    supervisor.join(60)


@ray.remote(num_cpus=0)
class Wanted:
    """Works for as long as the file says that there are more workers than its index."""

    def run(self, index: int, wanted: Path) -> str:
        while index < (count := int(wanted.read_text())):
            time.sleep(0.02)
        return "dismissed" if count else "ended"


def test_workers_come_and_go_with_the_number_that_is_wanted(tmp_path: Path) -> None:
    wanted, made, left = tmp_path / "wanted", list[int](), list[str]()

    def say(count: int) -> None:
        # In one move: a worker may be reading it.
        (tmp_path / "new").write_text(str(count))
        (tmp_path / "new").replace(wanted)

    def spawn(index: int) -> tuple[Any, Any]:
        worker = Wanted.remote()
        made.append(index)
        return worker, worker.run.remote(index, wanted)

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (made, left)
            supervisor.poll(0.05)

    supervisor = Supervisor(
        spawn, count=1, max_restarts=0, on_death=lambda part, why: None, on_leave=left.append
    )
    say(3)
    supervisor.start()
    supervisor.resize(3)
    assert made == [0, 1, 2]
    say(1)
    supervisor.resize(1, begun=("rollout-0", "rollout-1", "rollout-2"))
    until(lambda: len(left) == 2)
    assert sorted(left) == ["rollout-1", "rollout-2"]
    say(2)
    supervisor.resize(2)
    assert made == [0, 1, 2, 1]
    # Wanted again before it has gone: it is made anew once it has.
    say(1)
    supervisor.resize(1, begun=("rollout-0", "rollout-1"))
    supervisor.resize(2)
    until(lambda: made == [0, 1, 2, 1, 1])
    # Not wanted, and never heard of: nobody waits for it.
    say(3)
    supervisor.resize(3)
    supervisor.resize(2)
    assert left[2:] == ["rollout-2"]
    say(0)
    supervisor.join(60)
    assert len(left) == 3, "the others have ended with the run"


def test_the_death_of_a_worker_that_is_one_too_many_ends_nothing() -> None:
    left: list[str] = []

    def spawn(index: int) -> tuple[Any, Any]:
        worker = Failing.remote(RuntimeError("its node flaps"))
        return worker, worker.run.remote()

    supervisor = Supervisor(
        spawn, count=1, max_restarts=0, on_death=lambda part, why: None, on_leave=left.append
    )
    supervisor.start()
    supervisor.resize(0, begun=("rollout-0",))
    deadline = time.monotonic() + 60
    while not left:
        assert time.monotonic() < deadline
        supervisor.poll(0.1)
    assert left == ["rollout-0"]
