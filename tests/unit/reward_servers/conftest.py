"""A scorer that fails on cue, and servers around it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quickstart.render import render
from quickstart.words import train_word
from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.scorer import ItemScore, Scorer
from reward_servers.server_config import ServerConfig
from reward_servers.wire import ScoreCall

TOKEN = "a-token-for-tests-only"


class FakeScorer(Scorer):
    """Scores an image by its mean; does what the prompt says instead, if it says anything.

    Prompts: `raise`, `nan`, `error`, `unscorable`, `hang` (until `released` is set), `few` (one too few).
    """

    name = "fake"
    version = "7"
    batch_invariant = True
    max_batch = 4
    model = "mean of the pixels"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.entered = threading.Event()
        self.released = threading.Event()
        self.warm = False

    def check(self, prompt: str, metadata: dict[str, Any]) -> str | None:
        return "cannot be scored" if prompt == "unscorable" else None

    def warm_up(self) -> None:
        self.warm = True

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        self.calls.append(list(call.prompts))
        if "hang" in call.prompts:
            self.entered.set()
            assert self.released.wait(30)
        if "raise" in call.prompts:
            raise ArithmeticError("asked to raise")
        scores = [self._item(image, prompt) for image, prompt in zip(call.images, call.prompts, strict=True)]
        return scores[1:] if "few" in call.prompts else scores

    def _item(self, image: NDArray[np.uint8], prompt: str) -> ItemScore:
        if prompt == "error":
            return ItemScore(None, error="asked for an error")
        return ItemScore(float("nan") if prompt == "nan" else float(image.mean()), {"prompt": prompt})


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
