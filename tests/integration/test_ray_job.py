"""`ray job submit`: the same program, on a Ray cluster that is already there and asks for a token; and what
`dgpo doctor` says of the token."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from diffusers import StableDiffusion3Pipeline
from ray_nodes import Cluster, cluster_on_this_machine
from test_cli import settings

from services.config_file import ConfigError, load_config
from services.doctor.finding import Finding
from services.doctor.ray_cluster import ray_findings
from services.doctor.servers import queue_findings
from services.embedded import EmbeddedValkey
from services.preflight import refuse_unusable
from services.queue_connection import place
from services.run_directory import PROJECT_ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Asks for a token because there is one: nobody has set RAY_AUTH_MODE for it."""
    with cluster_on_this_machine("--num-cpus=4", of_nodes={"RAY_AUTH_MODE": None}) as made:
        yield made


def test_a_submitted_job_trains_a_lora_and_exports_it(cluster: Cluster, tmp_path: Path) -> None:
    job = ("python", "-m", "services.train", "--config", "recipes/quickstart.yaml", "--json")
    small = settings(
        tmp_path, "learner.max_steps=2", "model.train=lora", "model.lora.rank=4", "rewards.1.every=1"
    )
    done = cluster.ray("job", "submit", "--working-dir", ".", "--", *job, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(printed[-1])
    assert (result["steps"], result["groups"], result["interrupted"]) == (2, 4, False)
    pipeline = StableDiffusion3Pipeline.from_pretrained(PROJECT_ROOT / "quickstart" / "model")
    pipeline.load_lora_weights(Path(result["run_dir"]) / "export" / "lora")


def test_a_client_without_the_token_submits_nothing(cluster: Cluster) -> None:
    stranger = replace(cluster, environment={**cluster.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    refused = stranger.ray("job", "submit", "--", "python", "-c", "print(1)")
    assert refused.returncode != 0


OTHER = "0123456789abcdef" * 4
"""A token of another cluster."""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Of Ray, with nothing set and no token at home."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def told(*addresses: str) -> list[Finding]:
    """Of a GCS, or of a dashboard in the environment."""
    return ray_findings(load_config("quickstart", [f"cluster.address={address}" for address in addresses]))


def test_a_client_that_is_not_told_of_tokens_is_refused_and_the_doctor_says_why(
    cluster: Cluster, client: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = cluster.environment["RAY_AUTH_TOKEN"]
    unset = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_MODE"}
    refused = replace(cluster, environment=unset).ray("job", "list")
    assert refused.returncode != 0 and "Unauthorized" in refused.stderr + refused.stdout

    gcs = f"127.0.0.1:{cluster.port}"
    client.setenv("RAY_ADDRESS", cluster.dashboard)
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    ways = {"RAY_AUTH_TOKEN": {"RAY_AUTH_TOKEN": token}, str(file): {}}
    file.write_text(token + "\n")
    for source, environment in ways.items():
        with pytest.MonkeyPatch.context() as here:
            for name, value in environment.items():
                here.setenv(name, value)
            (dashboard,) = told()
            for finding in (dashboard, *told(gcs)[:1]):
                assert not finding.ok and "RAY_AUTH_MODE is not set" in finding.found
                assert finding.remedy == f"export RAY_AUTH_MODE=token; the token of {source} is the right one"
            here.setenv("RAY_AUTH_MODE", "disabled")
            assert "RAY_AUTH_MODE is disabled" in told()[0].found
            here.setenv("RAY_AUTH_MODE", "token")
            for finding in (*told(), *told(gcs)):
                assert finding.ok and not finding.warning
                assert f"takes the token of {source}" in finding.found
                assert token not in finding.model_dump_json()


def test_the_doctor_tells_a_wrong_token_and_none(cluster: Cluster, client: pytest.MonkeyPatch) -> None:
    gcs = f"127.0.0.1:{cluster.port}"
    client.setenv("RAY_API_SERVER_ADDRESS", cluster.dashboard)
    client.setenv("RAY_AUTH_MODE", "token")
    found = told(gcs)
    assert [finding.what for finding in found] == ["ray", "ray jobs"]
    for finding in found:
        assert not finding.ok and "asks for a token, and there is none here" in finding.found
        assert "the one that the cluster's nodes were started with" in finding.remedy
    client.setenv("RAY_AUTH_TOKEN", OTHER)
    for finding in told(gcs):
        assert not finding.ok and finding.found.endswith("refuses the token of RAY_AUTH_TOKEN")
        assert OTHER not in finding.model_dump_json()
    with pytest.raises(ConfigError, match="refuses the token of RAY_AUTH_TOKEN; export RAY_AUTH_MODE=token"):
        refuse_unusable(load_config("quickstart", [f"cluster.address={gcs}"]))
    client.setenv("RAY_AUTH_TOKEN", cluster.environment["RAY_AUTH_TOKEN"])
    refuse_unusable(load_config("quickstart", [f"cluster.address={gcs}"]))


def test_a_queue_and_a_gcs_that_are_mixed_up_are_told_apart(
    cluster: Cluster, client: pytest.MonkeyPatch, valkey: EmbeddedValkey
) -> None:
    gcs, queue = f"127.0.0.1:{cluster.port}", place(valkey.url)
    (found,) = queue_findings(load_config("quickstart", [f"queue.url=redis://{gcs}/0"]))
    assert not found.ok and "gRPC, not Redis, answers there" in found.found
    assert "6380 as in deploy/redis/redis.conf" in found.remedy
    (found,) = told(queue)
    assert not found.ok and "a Redis or Valkey answers there, not Ray" in found.found
    assert found.remedy.startswith("give the queue a port of its own, 6380")
    (found,) = told(cluster.dashboard.removeprefix("http://"))
    assert not found.ok and "a web server answers there" in found.found


@pytest.fixture(scope="module")
def tokenless() -> Iterator[Cluster]:
    with cluster_on_this_machine("--num-cpus=4", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=None) as made:
        yield made


def test_a_cluster_without_tokens_is_a_warning(tokenless: Cluster, client: pytest.MonkeyPatch) -> None:
    client.setenv("RAY_API_SERVER_ADDRESS", tokenless.dashboard)
    gcs = f"127.0.0.1:{tokenless.port}"
    for finding in told(gcs):
        assert finding.ok and finding.warning and "whoever reaches it runs code" in finding.found
        assert "ray get-auth-token --generate" in finding.remedy
    client.setenv("RAY_AUTH_MODE", "token")
    for finding in told(gcs):
        assert not finding.ok and "Ray's clients refuse to start without one" in finding.found
        assert "RAY_AUTH_MODE=disabled" in finding.remedy


@pytest.mark.slow
def test_a_run_does_not_need_the_dashboard(
    tokenless: Cluster, client: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = int(tokenless.dashboard.rpartition(":")[2])
    (dashboard,) = {
        each.pid
        for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    }
    # Stopped, not ended: with --block, a head of which one process ends ends as a whole.
    psutil.Process(dashboard).suspend()
    client.setenv("RAY_API_SERVER_ADDRESS", tokenless.dashboard)
    gcs = f"127.0.0.1:{tokenless.port}"
    joined, jobs = told(gcs)
    assert joined.ok and not jobs.ok and "no Ray dashboard answers at" in jobs.found
    small = settings(tmp_path, "learner.max_steps=1", "eval.final_prompts=4")
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "train", "quickstart", "--json", *small],
        env={**tokenless.environment, "RAY_ADDRESS": gcs},
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 1
