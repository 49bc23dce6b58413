"""DeQA-Score's formula, on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from reward_servers.deqa.formula import (
    IMAGE_TOKEN,
    PROMPT,
    Preprocessing,
    level_ids,
    level_probabilities,
    pad_to_square,
    prompt_ids,
    quality,
)


def test_pad_to_square() -> None:
    image = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    square = pad_to_square(image, Preprocessing().mean)
    assert square.shape == (5, 5, 3)
    assert np.array_equal(square[1:3], image)
    assert {tuple(map(int, colour)) for colour in square[[0, 3, 4]].reshape(-1, 3)} == {(122, 116, 104)}
    assert np.array_equal(
        pad_to_square(image.transpose(1, 0, 2), (0, 0, 0))[:, 1:3], image.transpose(1, 0, 2)
    )
    assert np.array_equal(pad_to_square(image[:, :2], (0, 0, 0)), image[:, :2])


def test_quality() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125, 1e-30], [1.0, 1.0, 1.0, 1.0, 1.0]])) + 300
    assert quality(level_probabilities(logits)).tolist() == pytest.approx([4.125, 3.0])
    best, worst = np.full((1, 5), -1e4, np.float32), np.full((1, 5), -1e4, np.float32)
    best[0, 0] = worst[0, 4] = 1e4
    assert quality(level_probabilities(best)).tolist() == [5.0]
    assert quality(level_probabilities(worst)).tolist() == [1.0]


def test_the_image_stands_between_the_two_texts() -> None:
    ids = prompt_ids(lambda text: [1, *map(ord, text)], 1)
    assert ids == [1, *map(ord, PROMPT[:52]), IMAGE_TOKEN, *map(ord, PROMPT[61:])]
    assert PROMPT[52:61] == "<|image|>" and ids.count(1) == 1
    with pytest.raises(ValueError, match="not Llama's"):
        prompt_ids(lambda text: [*map(ord, text)], 1)


def test_levels_must_be_tokens_of_their_own() -> None:
    assert level_ids(lambda text: [1, 100 + len(text) + ord(text[0])], 1) == [210, 207, 206, 216, 201]
    for tokenize in (lambda text: [1, 7, 8], lambda text: [1, 7], lambda text: [7, len(text) + ord(text[0])]):
        with pytest.raises(ValueError, match="one token each"):
            level_ids(tokenize, 1)
