"""A picture that is read as one line of text is warned of, once."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from reward_servers.scorers import load_scorer
from reward_servers.wire import ScoreCall


def call_of(*sizes: tuple[int, int]) -> ScoreCall:
    images = [np.full((height, width, 3), 255, np.uint8) for height, width in sizes]
    return ScoreCall(images, ['"A"'] * len(images), [{}] * len(images))


@pytest.mark.parametrize(("name", "remedy"), [("ocr", "detect: true"), ("ocr_tesseract", "page: sparse")])
def test_a_picture_is_warned_of_once(name: str, remedy: str, caplog: pytest.LogCaptureFixture) -> None:
    scorer = load_scorer(name)
    with caplog.at_level(logging.WARNING):
        scorer.score(call_of((32, 64), (64, 64), (128, 128), (200, 800)))
        assert caplog.messages == []
        for _ in range(2):
            scorer.score(call_of((32, 64), (256, 256)))
    (message,) = caplog.messages
    assert f"'{name}'" in message and "256 x 256" in message and remedy in message


@pytest.mark.parametrize(("name", "args"), [("ocr", {"detect": True}), ("ocr_tesseract", {"page": "sparse"})])
def test_who_looks_for_lines_is_not_warned(
    name: str, args: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_scorer(name, args).score(call_of((256, 256)))
    assert caplog.messages == []
