"""`ray job submit`: the same program, on a Ray cluster that is already there and asks for a token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from diffusers import StableDiffusion3Pipeline
from test_cli import settings

from services.run_directory import PROJECT_ROOT
from tests.ports import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

RAY = str(Path(sys.executable).with_name("ray"))


class Cluster(NamedTuple):
    dashboard: str
    environment: dict[str, str]
    port: int


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    dashboard, port = free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
    }
    # --block and a process group of its own: `ray stop` would stop every Ray of this machine.
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"),
            *("--num-cpus=4", "--object-store-memory=200000000", "--disable-usage-stats"),
            *(
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                "--dashboard-agent-listen-port=0",
            ),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        made = Cluster(f"http://127.0.0.1:{dashboard}", environment, port)
        give_up = time.monotonic() + 90
        while ray(made, "job", "list").returncode != 0:
            assert head.poll() is None and time.monotonic() < give_up, "the cluster did not start"
            time.sleep(1)
        yield made
    finally:
        # Ray takes half a minute to end by itself.
        processes = psutil.Process(head.pid).children(recursive=True)
        for process in (psutil.Process(head.pid), *processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=60)


def ray(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.dashboard}
    return subprocess.run(
        [RAY, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=PROJECT_ROOT,
        check=False,
    )


def test_a_submitted_job_trains_a_lora_and_exports_it(cluster: Cluster, tmp_path: Path) -> None:
    job = ("python", "-m", "services.train", "--config", "recipes/quickstart.yaml", "--json")
    small = settings(
        tmp_path, "learner.max_steps=2", "model.train=lora", "model.lora.rank=4", "rewards.1.every=1"
    )
    done = ray(cluster, "job", "submit", "--working-dir", ".", "--", *job, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(printed[-1])
    assert (result["steps"], result["groups"], result["interrupted"]) == (2, 4, False)
    pipeline = StableDiffusion3Pipeline.from_pretrained(PROJECT_ROOT / "quickstart" / "model")
    pipeline.load_lora_weights(Path(result["run_dir"]) / "export" / "lora")


def test_a_client_without_the_token_submits_nothing(cluster: Cluster) -> None:
    stranger = cluster._replace(environment={**cluster.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    refused = ray(stranger, "job", "submit", "--", "python", "-c", "print(1)")
    assert refused.returncode != 0
