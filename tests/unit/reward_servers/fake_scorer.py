"""A scorer that fails on cue."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward_servers.scorer import ItemScore, Scorer
from reward_servers.wire import ScoreCall


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
