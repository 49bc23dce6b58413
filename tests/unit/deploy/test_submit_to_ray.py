"""deploy/submit.sh against a real Ray of two nodes: a head that claims a GPU, and a node for drivers."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from services.config_file import PROJECT_ROOT
from tests.ports import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))
START_DEADLINE_S = 120.0
# Stands for the trainer: says what it was started with; its run lasts until it is stopped.
PROGRAM = """
import json, os, pathlib, signal, sys, time

words = sys.argv[1:]
if "--resume" in words:
    directory = pathlib.Path(words[words.index("--resume") + 1])
else:
    (parent,) = [w.removeprefix("run.directory=") for w in words if w.startswith("run.directory=")]
    directory = pathlib.Path(parent) / "mine-1"
    directory.mkdir()
    (directory / "config.yaml").touch()
tree = sorted(str(p) for p in pathlib.Path(".").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
grace = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
print("SEEN " + json.dumps({"words": words, "tree": tree, "grace": grace}), flush=True)
if "--resume" not in words:
    def stopped(number, frame):
        # Longer than Ray waits by itself.
        time.sleep(5)
        (directory / "drained").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stopped)
    (directory / "started").touch()
    time.sleep(600)
"""


class Cluster(NamedTuple):
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("ray")
    gcs, dashboard = free_ports(2)
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "DGPO_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        with (logs / f"node-{len(started)}.log").open("wb") as log:
            # A process group of its own: `ray stop` would stop every Ray of this machine.
            node = subprocess.Popen(
                [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *arguments],
                env={**environment, "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(node)

    def wait_for(count: int) -> None:
        give_up = time.monotonic() + START_DEADLINE_S
        while len(nodes(made)) < count:
            for number, process in enumerate(started):
                log = (logs / f"node-{number}.log").read_text()
                assert process.poll() is None and time.monotonic() < give_up, log

    start(
        *("--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *("--dashboard-agent-listen-port=0", "--num-cpus=2", "--num-gpus=1"),
        "--object-store-memory=100000000",
    )
    made = Cluster(f"http://127.0.0.1:{dashboard}", environment)
    try:
        wait_for(1)
        start(
            *(f"--address=127.0.0.1:{gcs}", "--num-cpus=1", "--object-store-memory=100000000"),
            *("--dashboard-agent-listen-port=0", '--resources={"dgpo_driver": 1}'),
        )
        wait_for(2)
        yield made
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            process.wait(timeout=60)


def ray(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, "RAY_AUTH_MODE": "token"}
    return subprocess.run(
        [RAY, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def asked(cluster: Cluster, path: str) -> Any:
    """What the dashboard answers; a command of `ray` would take seconds."""
    headers = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    answer = httpx.get(cluster.address + path, headers=headers, timeout=60, trust_env=False)
    return answer.raise_for_status().json()


def nodes(cluster: Cluster) -> dict[str, dict[str, float]]:
    """Node id -> its resources; none while the dashboard does not answer yet."""
    try:
        found = asked(cluster, "/api/v0/nodes?detail=1")["data"]["result"]["result"]
    except httpx.HTTPError:
        time.sleep(0.2)
        return {}
    return {entry["node_id"]: entry["resources_total"] for entry in found}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with another trainer, and all that a job must not take along."""
    root = tmp_path / "checkout"
    (root / "deploy").mkdir(parents=True)
    for name in ("submit.sh", "attempt.sh", "runtime_env.yaml"):
        shutil.copy2(PROJECT_ROOT / "deploy" / name, root / "deploy")
    (root / "recipes").mkdir()
    (root / "recipes" / "quickstart.yaml").touch()
    (root / "services").mkdir()
    (root / "services" / "__init__.py").touch()
    (root / "services" / "train.py").write_text(PROGRAM)
    for name in (
        *(".git/config", ".venv/bin/python", "runs/r/checkpoint", "recordings/g", "tests/t.py", "docs/d.md"),
        *("build/lib.py", "x.egg-info/PKG", ".mypy_cache/m", "services/__pycache__/c.pyc"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("must not go along")
    return root


def submit(
    cluster: Cluster, tree: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(tree / "deploy" / "submit.sh"), "--address", cluster.address, *arguments],
        env={**cluster.environment, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_run_is_begun_stopped_and_gone_on_with(cluster: Cluster, tree: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = submit(cluster, tree, "--runs", str(runs), "--name", "mine", "--no-wait", "quickstart", "a.b=1 2")
    assert first.returncode == 0, first.stdout + first.stderr
    give_up = time.monotonic() + START_DEADLINE_S
    while not (runs / "mine" / "mine-1" / "started").exists():
        assert time.monotonic() < give_up, ray(cluster, "job", "logs", "mine-attempt-1").stderr
        time.sleep(0.2)
    again = submit(cluster, tree, "--runs", str(runs), "--resume", "mine")
    assert again.returncode == 2 and "attempt 1 of mine is RUNNING" in again.stderr

    stopped = ray(cluster, "job", "stop", "mine-attempt-1", "--address", cluster.address)
    assert stopped.returncode == 0, stopped.stderr
    assert (runs / "mine" / "mine-1" / "drained").exists(), "SIGTERM reached the driver, and it had its time"

    second = submit(cluster, tree, "--runs", str(runs), "--resume", "mine", "a.b=3 4")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "mine-attempt-2" in second.stdout
    (line,) = re.findall(r"SEEN (\{.*\})", second.stdout)
    seen = json.loads(line)
    assert seen["words"] == ["--json", "--resume", f"{runs}/mine/mine-1", "--set", "a.b=3 4"]
    assert seen["tree"] == [
        *("deploy/attempt.sh", "deploy/runtime_env.yaml", "deploy/submit.sh", "recipes/quickstart.yaml"),
        *("services/__init__.py", "services/train.py"),
    ]
    assert seen["grace"] == "300"

    places = [
        job["driver_node_id"]
        for job in asked(cluster, "/api/jobs/")
        if job["submission_id"] in ("mine-attempt-1", "mine-attempt-2")
    ]
    there = nodes(cluster)
    assert len(places) == 2
    assert all("dgpo_driver" in there[place] and "GPU" not in there[place] for place in places)


def test_the_program_itself_goes_along(cluster: Cluster, tmp_path: Path) -> None:
    """The real trainer, from this checkout, refuses a setting: all of it that reads recipes was uploaded."""
    done = submit(
        cluster,
        PROJECT_ROOT,
        "--runs",
        str(tmp_path),
        "--name",
        "refused",
        "quickstart",
        "learner.max_steps=-1",
    )
    assert done.returncode == 1
    assert "learner.max_steps" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.glob("refused/*")) == []


def test_a_wrong_token_is_told_in_words(cluster: Cluster, tree: Path) -> None:
    done = submit(cluster, tree, "--runs", "/r", "quickstart", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode == 2
    assert "refuses this client" in done.stderr and "Traceback" not in done.stderr
