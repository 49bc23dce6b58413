import random

import numpy as np
import pytest
from numpy.typing import NDArray

from quickstart.diversity import diversity, look
from quickstart.render import render
from quickstart.words import heldout_words

GROUP_SIZE = 4


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    rng = random.Random(0)
    words = [word for word in heldout_words(24, seed=0) for _ in range(GROUP_SIZE)]
    return np.stack([render(word, rng) for word in words])


def test_colours_and_places_are_measured() -> None:
    image = np.full((1, 32, 64, 3), (200, 220, 240), dtype=np.uint8)
    image[0, 10:22, 20:40] = (10, 60, 90)
    seen = look(image)
    assert seen.background[0].tolist() == [200, 220, 240]
    assert seen.text[0].tolist() == [10, 60, 90]
    assert seen.placement[0].tolist() == [29.5, 15.5]
    assert seen.glyph_size[0, 0] == 12


def test_grey_images_lose_the_colour_measures_only(images: NDArray[np.uint8]) -> None:
    before = diversity(images, GROUP_SIZE)
    light = images.mean(axis=-1, keepdims=True) > 128
    after = diversity(np.where(light, 230, 30).astype(np.uint8).repeat(3, axis=-1), GROUP_SIZE)
    for part in ("background", "text"):
        assert after[f"{part}_across"] < 0.5 * before[f"{part}_across"]
        assert after[f"{part}_within"] < 0.5 * before[f"{part}_within"]
    assert after["placement_across"] > 0.5 * before["placement_across"]


def test_groups_of_one_image_have_nothing_within(images: NDArray[np.uint8]) -> None:
    collapsed = images[::GROUP_SIZE].repeat(GROUP_SIZE, axis=0)
    before, after = diversity(images, GROUP_SIZE), diversity(collapsed, GROUP_SIZE)
    for part in ("background", "text", "placement", "glyph_size"):
        assert before[f"{part}_within"] > 0.0
        assert after[f"{part}_within"] == pytest.approx(0.0)
        assert after[f"{part}_across"] > 0.0


def test_images_that_are_all_alike_measure_zero() -> None:
    blank = np.full((8, 32, 64, 3), 128, dtype=np.uint8)
    assert set(diversity(blank, GROUP_SIZE).values()) == {0.0}


def test_broken_groups_are_an_error(images: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="no whole number of groups"):
        diversity(images[:5], GROUP_SIZE)
