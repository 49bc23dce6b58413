"""`ray job submit`: the same program, on a Ray cluster that is already there and asks for a token."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline
from ray_nodes import Cluster, cluster_on_this_machine
from test_cli import settings

from services.config_file import PROJECT_ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_on_this_machine("--num-cpus=4") as made:
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
