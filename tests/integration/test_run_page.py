"""`dgpo ui` as a process of its own, over a run with a live queue: addresses, what it tells, how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil
import pytest

from services.embedded import EmbeddedValkey
from services.group_queue import GroupQueue, connect
from services.messages import Heartbeat, PolicyVersion, WeightsAnnouncement
from services.run_directory import RunDirectory
from tests.unit.services.ui.made_runs import HOSTILE, a_run, append, update

pytestmark = pytest.mark.integration

DEADLINE_S = 120.0


@contextmanager
def page_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`dgpo ui ... --port 0 --json`, and what it has printed once it answers."""
    command = [sys.executable, "-m", "services.cli", "ui", *arguments, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        alarm = threading.Timer(DEADLINE_S, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            yield process, json.loads(line)
        finally:
            alarm.cancel()
            process.kill()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return a_run(tmp_path)


@pytest.fixture
def queue(run: RunDirectory) -> Iterator[GroupQueue]:
    with EmbeddedValkey(run.queue) as server:
        yield live_queue(run, server)


def live_queue(run: RunDirectory, server: EmbeddedValkey) -> GroupQueue:
    """A run that goes on, as its queue tells it."""
    queue = GroupQueue(connect(server.url, server.password), run.name, run.config().queue)
    queue.set_state("running")
    version = PolicyVersion(epoch=0, step=3)
    queue.begin_epoch(
        lambda version: WeightsAnnouncement(version=version, digest="d", tensors=1, bytes=1),
        limit=64,
        window=16,
    )
    queue.want_workers(2)
    beat = Heartbeat(part="learner-0", state="waiting for groups", since=1000.0, pid=7, node="here")
    queue.beat(beat.model_copy(update={"version": version}), 600)
    queue.beat(beat.model_copy(update={"part": "rollout-0", "state": "sampling", "ordinal": 3}), 600)
    queue.beat(beat.model_copy(update={"part": "rollout-1", "state": f"scoring {HOSTILE}"}), 600)
    return queue


def _first_status(client: httpx.Client) -> dict[str, Any]:
    """The first one of the stream for which the queue was asked."""
    with client.stream("GET", "/api/stream", timeout=DEADLINE_S) as answer:
        kind = ""
        for line in answer.iter_lines():
            kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
            if kind == "status" and line.startswith("data: "):
                told: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if told["asked"] is not None:
                    return told
    raise AssertionError("the stream has ended")


def test_the_page_of_a_live_run(run: RunDirectory, queue: GroupQueue) -> None:
    append(run, map(update, range(1, 4)))
    with page_process(str(run.root)) as (process, told):
        parts = urlsplit(told["address"])
        assert parts.hostname == "127.0.0.1"
        assert len(parse_qs(parts.query)["token"][0]) >= 40
        listening = [
            one.laddr.ip
            for one in psutil.Process(process.pid).net_connections()
            if one.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]
        assert httpx.get(told["url"]).status_code == 401
        with httpx.Client(base_url=told["url"], follow_redirects=True) as client:
            page = client.get(told["address"])
            assert page.status_code == 200
            assert "token" not in str(page.url)
            status = _first_status(client)
            assert status["problem"] == ""
            assert status["status"]["state"] == "running"
            assert {part["part"] for part in status["status"]["parts"]} == {
                "learner-0",
                "rollout-0",
                "rollout-1",
            }
            assert status["status"]["workers_wanted"] == 2
            assert status["step"] == 3
            with client.stream("GET", "/api/stream", timeout=DEADLINE_S) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGINT)
                for _ in lines:
                    pass
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert "ERROR" not in said
        assert "Traceback" not in said


def test_a_token_of_the_environment(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that an address has to quote."""
    monkeypatch.setenv("PAGE_TOKEN", token := "sixteen+/=&#%41-or-more")
    with page_process(str(run.root), "--token-env", "PAGE_TOKEN") as (_, told):
        headers = {"authorization": f"Bearer {token}"}
        assert httpx.get(told["url"] + "/api/run", headers=headers).json()["name"] == run.name
        with httpx.Client(follow_redirects=True) as browser:
            assert browser.get(told["address"]).status_code == 200


def test_beyond_loopback_says_what_that_means(run: RunDirectory) -> None:
    with page_process(str(run.root), "--host", "0.0.0.0") as (process, told):
        port = urlsplit(told["url"]).port
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/", headers={"host": "evil.example"}).status_code == 421
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert "beyond this machine" in said
        assert "clear text" in said
