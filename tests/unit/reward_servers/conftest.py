"""Servers around a scorer that fails on cue."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quickstart.render import render
from quickstart.words import train_word
from reward_servers.app import create_app
from reward_servers.client import RewardClient, Scored
from reward_servers.local import LocalServer
from reward_servers.server_config import ServerConfig
from tests.unit.reward_servers.fake_scorer import FakeScorer
from tests.unit.reward_servers.scripted_server import TOKEN, Reply, Script


@pytest.fixture
def fake() -> Iterator[FakeScorer]:
    scorer = FakeScorer()
    yield scorer
    scorer.released.set()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(TOKEN + "\n")
    return file


@pytest.fixture
def serve_fake(fake: FakeScorer, token_file: Path) -> Iterator[Callable[..., str]]:
    """Starts a server of the fake scorer with the given settings; returns its address."""
    with ExitStack() as stack:

        def start(**settings: Any) -> str:
            config = ServerConfig(app="fake", token_file=token_file, **settings)
            return stack.enter_context(LocalServer(create_app(config, scorer=fake))).url

        yield start
        fake.released.set()


@pytest.fixture
def token() -> str:
    return TOKEN


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """(5, 6, 8, 3)"""
    return np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)


@pytest.fixture(scope="session")
def words() -> tuple[list[str], NDArray[np.uint8]]:
    """Words and their renders, (20, 32, 64, 3)."""
    rng = random.Random(5)
    chosen = [train_word(rng) for _ in range(20)]
    return chosen, np.stack([render(word, rng) for word in chosen])


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[str, Script]]:
    script = Script([])
    with LocalServer(script) as server:
        yield server.url, script


@pytest.fixture
def scripted(stage: tuple[str, Script]) -> Callable[..., tuple[str, Script]]:
    """A server that gives these replies."""

    def start(*replies: Reply) -> tuple[str, Script]:
        url, script = stage
        script.replies, script.requests = list(replies), []
        return url, script

    return start


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Scored]:
    """Scores through either face of the client."""

    def score(client: RewardClient, images: NDArray[np.uint8], prompts: Any = "p") -> Scored:
        if request.param == "sync":
            try:
                return client.score(images, prompts)
            finally:
                client.close()

        async def run() -> Scored:
            try:
                return await client.score_async(images, prompts)
            finally:
                await client.aclose()

        return asyncio.run(run())

    return score
