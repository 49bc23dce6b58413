"""From nothing to the first update of a recipe through `ray job submit`, second by second.

A Ray head is started on loopback with a token, as docs/cluster.md does, and `deploy/submit.sh` submits the
recipe to it, as a person would. Nothing is waited for that the run does not wait for: the times are those of
processes, files, log lines and rows that the run leaves anyway. When the first update is in metrics.jsonl the
cluster is killed.

Phases follow one another and add up to the whole; inside of the last ones several parts start at once, so
beside the phases it is told when each part was ready.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from services.config_file import PROJECT_ROOT
from services.run_directory import RunDirectory
from services.telemetry import METRICS_FILE, read_metrics

TARGET_S: Final = 90.0
DEADLINE_S: Final = 600.0
POLL_S: Final = 0.05
NAME: Final = "bench"
SUBMIT: Final = PROJECT_ROOT / "deploy" / "submit.sh"
PORTS: Final = range(20_000, 32_768)
"""Between those that Ray keeps for its workers and those that Linux gives to whoever asks for any."""

Moments = dict[str, float]
"""What was reached -> unix time."""

PHASES: Final[tuple[tuple[str, str], ...]] = (
    ("cluster", "the Ray head starts, until its dashboard answers"),
    ("asked", "submit.sh asks it for jobs and nodes"),
    ("submitted", "`ray job submit` starts, packs and uploads the checkout"),
    ("process", "Ray unpacks it and starts the driver's process"),
    ("directory", "the driver imports, reads the recipe, makes the run directory"),
    ("queue", "it joins Ray and starts the queue"),
    ("rewards", "the reward servers start; the learner's process too, beside them"),
    ("models", "workers and learner load their models"),
    ("groups", "the groups of the first update are sampled and scored"),
    ("update", "the first update"),
)
"""Moment that ends a phase -> what happens in it."""
PARTS: Final = (
    "learner's process",
    "learner ready",
    "rewards ready",
    "first worker ready",
    "last worker ready",
)


class Head(NamedTuple):
    """A Ray head of this bench."""

    dashboard: str
    environment: dict[str, str]

    def asked(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        answer = httpx.get(self.dashboard + path, headers=headers, timeout=30, trust_env=False)
        return answer.raise_for_status().json()


def run_submit_bench(
    screen: Console | None = None,
    *,
    runs: int = 1,
    recipe: str = "quickstart",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Seconds by phase.

    Args:
        runs: how often, each on a cluster of its own; the table has the fastest.

    Returns:
        `seconds` of the fastest run and its `phases` (name -> seconds, which add up to it) and `parts` (name
        -> seconds behind the beginning); `all_seconds`, `median_s`; `target_s`, `met`.

    Raises:
        RuntimeError: this is no checkout, the cluster did not start, or the run made no update.
    """
    if not SUBMIT.is_file():
        raise RuntimeError(f"{SUBMIT} is not there: call this from a checkout of the project")
    found = [_one(recipe, overrides) for _ in range(runs)]
    best = min(found, key=lambda moments: moments["update"] - moments["began"])
    seconds = [moments["update"] - moments["began"] for moments in found]
    result = {
        "benchmark": "submit",
        "recipe": recipe,
        "cpus": os.cpu_count(),
        "runs": runs,
        "seconds": min(seconds),
        "all_seconds": seconds,
        "median_s": statistics.median(seconds),
        "phases": phases(best),
        "parts": {name: best[name] - best["began"] for name in PARTS},
        "target_s": TARGET_S,
        "met": min(seconds) < TARGET_S,
    }
    if screen is not None:
        screen.print(_table(result))
    return result


def phases(moments: Moments) -> dict[str, float]:
    """Each phase lasts from the end of the one before; one that others have outlasted takes no time."""
    lasted, before = {}, moments["began"]
    for name, _ in PHASES:
        lasted[name] = max(0.0, moments[name] - before)
        before = max(before, moments[name])
    return lasted


def _one(recipe: str, overrides: Sequence[str]) -> Moments:
    with tempfile.TemporaryDirectory() as folder, _head(Path(folder)) as (head, moments):
        runs, log = Path(folder) / "runs", Path(folder) / "submit.log"
        command = [
            str(SUBMIT),
            "--runs",
            str(runs),
            "--name",
            NAME,
            "--address",
            head.dashboard,
            recipe,
            *overrides,
        ]
        with log.open("wb") as output:
            submitting = subprocess.Popen(
                command, env=head.environment, cwd=PROJECT_ROOT, stdout=output, stderr=output
            )
        try:
            _follow(moments, head, runs, log, submitting)
        finally:
            _kill(submitting)
        return moments


def _follow(moments: Moments, head: Head, runs: Path, log: Path, submitting: subprocess.Popen[bytes]) -> None:
    def await_(what: str, look: Callable[[], float | None]) -> None:
        give_up = time.monotonic() + DEADLINE_S
        while (reached := look()) is None:
            if submitting.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"nothing seen of: {what}\n{log.read_text(errors='replace')}")
            time.sleep(POLL_S)
        moments[what] = reached

    await_("asked", lambda: time.time() if "ray job submit" in log.read_text(errors="replace") else None)
    await_("process", lambda: _started(head, moments))
    await_("directory", lambda: next((_changed(found) for found in runs.glob(f"{NAME}/*/config.yaml")), None))
    (root,) = runs.glob(f"{NAME}/*")
    run = RunDirectory.open(root)
    await_("update", lambda: _first_update(run, moments))
    driver = _lines(run.logs / "driver.log")
    moments["queue"] = _when(driver, "starting the reward servers")
    moments["rewards"] = moments["rewards ready"] = _when(driver, "loading the models")
    learner = _lines(run.logs / "learner-0.log")
    moments["learner ready"] = _when(learner, "starts at step")
    ready = sorted(_when(_lines(log), "ready to sample") for log in run.logs.glob("rollout-*.log"))
    moments["first worker ready"], moments["last worker ready"] = ready[0], ready[-1]
    moments["models"] = max(ready[0], moments["learner ready"])


def _started(head: Head, moments: Moments) -> float | None:
    """When Ray started the driver's process; None before it has."""
    try:
        jobs = head.asked("/api/jobs/")
    except httpx.HTTPError:
        return None  # a dashboard that is busy starting
    for job in jobs:
        if job["submission_id"] and job.get("driver_info"):
            moments["submitted"] = job["start_time"] / 1000
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(int(job["driver_info"]["pid"])).create_time()
    return None


def _first_update(run: RunDirectory, moments: Moments) -> float | None:
    learner = run.logs / "learner-0.log"
    if "learner's process" not in moments and learner.exists():
        moments["learner's process"] = time.time()
    if not (run.root / METRICS_FILE).exists() or not (rows := read_metrics(run.root).updates):
        return None
    moments["groups"] = rows[0].time - rows[0].seconds + rows[0].phases["wait_s"]
    return rows[0].time


def _changed(file: Path) -> float:
    return file.stat().st_mtime


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").splitlines()


def _when(lines: list[str], message: str) -> float:
    line = next(line for line in lines if message in line)
    return datetime.strptime(line.split()[0], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()


@contextmanager
def _head(folder: Path) -> Iterator[tuple[Head, Moments]]:
    gcs, dashboard = _free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    head = Head(f"http://127.0.0.1:{dashboard}", environment)
    moments = {"began": time.time()}
    with (folder / "head.log").open("wb") as log:
        # --block and a process group of its own: `ray stop` would stop every Ray of this machine.
        process = subprocess.Popen(
            [
                *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"),
                *("--dashboard-agent-listen-port=0", '--resources={"dgpo_driver": 1}'),
            ],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        give_up = time.monotonic() + DEADLINE_S
        while not _answers(head):
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the Ray head did not start:\n{(folder / 'head.log').read_text()}")
            time.sleep(POLL_S)
        moments["cluster"] = time.time()
        yield head, moments
    finally:
        _kill(process)


def _answers(head: Head) -> bool:
    try:
        head.asked("/api/jobs/")
    except httpx.HTTPError:
        return False
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started: Ray takes half a minute to end by itself."""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(process.pid)
        for each in (*whole.children(recursive=True), whole):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait(timeout=60)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            with contextlib.suppress(OSError):
                port = random.SystemRandom().choice(PORTS)
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
        return found


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['recipe']} through ray job submit, {result['cpus']} CPUs: fastest of {result['runs']}"
    table = Table(title=title)
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("by then", justify="right")
    by_then = 0.0
    for name, text in PHASES:
        by_then += result["phases"][name]
        table.add_row(text, f"{result['phases'][name]:.1f}", f"{by_then:.1f}")
    table.add_section()
    for name, seconds in result["parts"].items():
        table.add_row(name, "", f"{seconds:.1f}")
    table.add_section()
    table.add_row("sum", f"{result['seconds']:.1f}", "")
    table.add_row("target", f"{result['target_s']:.0f}", "met" if result["met"] else "missed")
    return table
