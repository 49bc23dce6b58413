import random

import numpy as np
import pytest

from quickstart.read import Recognizer, reward_of
from quickstart.render import HEIGHT, WIDTH, render
from quickstart.words import heldout_words


def test_an_image_follows_from_word_and_random_state() -> None:
    image = render("K7QX", random.Random(5))
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert np.array_equal(image, render("K7QX", random.Random(5)))
    assert not np.array_equal(image, render("K7QX", random.Random(6)))


def test_renders_are_read_back() -> None:
    words = heldout_words(64, seed=0)
    rng = random.Random(0)
    reading = Recognizer().score(np.stack([render(word, rng) for word in words]), words)
    assert reading.reward >= 0.97
    assert reading.exact >= 0.95


@pytest.mark.parametrize(
    ("text", "expected"),
    [("k7qx", 1.0), ("xk7qxx", 1.0), ("k7q", 0.75), ("k7", 0.5), ("", 0.0), ("far too long", 0.0)],
)
def test_reward_is_the_published_formula(text: str, expected: float) -> None:
    assert reward_of(text, "k7qx") == expected
