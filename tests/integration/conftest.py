"""What integration tests share: one small Ray, runs of the queue alone, a reward server, small whole runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from queue_support import Run
from small_runs import SMALL, STEPS, TOKEN_VARIABLE, run

from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.server_config import ServerConfig
from services.config import Config
from services.config_file import load_config
from services.embedded import EmbeddedValkey
from services.ray_runtime import start_on_loopback

# Ray's workers inherit the environment of the moment in which Ray starts.
os.environ[TOKEN_VARIABLE] = "a-token-for-tests-only"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of four (logical) CPUs on loopback, for the whole test session."""
    # Ray's workers are nice (15) by default: beside anything else they would get next to no time.
    os.environ.setdefault("RAY_worker_niceness", "0")
    start_on_loopback(4, object_store_bytes=200 * 1024**2)
    yield
    ray.shutdown()


@pytest.fixture(name="run")
def synchronous_run(valkey: EmbeddedValkey, run_name: str) -> Run:
    """Of the queue alone: two groups a step."""
    return Run(valkey, run_name)


@pytest.fixture
def stale(valkey: EmbeddedValkey, run_name: str) -> Run:
    """One that allows one update of staleness."""
    return Run(valkey, run_name, max_staleness=1)


@pytest.fixture(scope="session")
def ocr_url() -> Iterator[str]:
    """A reward server that reads words."""
    with LocalServer(create_app(ServerConfig(app="ocr", token_env=TOKEN_VARIABLE))) as server:
        yield server.url


@pytest.fixture
def recipe(tmp_path: Path, ocr_url: str) -> Callable[..., Config]:
    """Overrides -> the quickstart, over in seconds."""

    def make(*overrides: str) -> Config:
        return load_config(
            "quickstart",
            [
                f"run.directory={tmp_path}",
                *SMALL,
                "learner.groups_per_step=2",
                f"learner.max_steps={STEPS}",
                "eval.every_steps=0",
                "eval.final_prompts=4",
                f"rewards=[{{name: ocr, url: '{ocr_url}', token_env: {TOKEN_VARIABLE}}}]",
                *overrides,
            ],
        )

    return make


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, str]:
    """The digest of a run that nobody disturbed, once it is known."""
    return {}


@pytest.fixture
def digest(recipe: Callable[..., Config], undisturbed: dict[str, str]) -> str:
    if not undisturbed:
        undisturbed["digest"] = run(recipe("rollout.workers=1")).weights_digest
    return undisturbed["digest"]
