import random

import numpy as np

from quickstart.render import HEIGHT, WIDTH, render
from quickstart.words import heldout_words, prompt_of
from reward_servers.scorers import ocr
from reward_servers.wire import ScoreCall


def test_an_image_follows_from_word_and_random_state() -> None:
    image = render("K7QX", random.Random(5))
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert np.array_equal(image, render("K7QX", random.Random(5)))
    assert not np.array_equal(image, render("K7QX", random.Random(6)))


def test_renders_are_read_back() -> None:
    words = heldout_words(64, seed=0)
    rng = random.Random(0)
    images = [render(word, rng) for word in words]
    call = ScoreCall(images, [prompt_of(word) for word in words], [{} for _ in words])
    read = ocr.create({}, 1).score(call)
    assert np.mean([item.score for item in read]) >= 0.97
    assert np.mean([item.details["exact"] for item in read]) >= 0.95
