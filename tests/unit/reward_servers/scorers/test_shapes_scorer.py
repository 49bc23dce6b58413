"""The scorer of coloured shapes sees in ground truth what was asked for, and nothing where nothing is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from quickstart.shapes.render import render
from quickstart.shapes.requests import Request, any_request, mistaken, training_request
from reward_servers.geneval.task import TAGS
from reward_servers.scorers import load_scorer
from reward_servers.shapes.detector import MAX_OBJECTS, find_shapes
from reward_servers.shapes.drawing import coverage
from reward_servers.shapes.outlines import COLOURS, PALETTE, SHAPES
from reward_servers.wire import ScoreCall

Image = NDArray[np.uint8]
EACH = 60
RULES = ("official", "strict", "dense")


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(0)
    return [any_request(tag, rng) for tag in TAGS for _ in range(EACH)]


@pytest.fixture(scope="module")
def renders(requests: list[Request]) -> list[Image]:
    rng = random.Random(1)
    return [render(request, rng) for request in requests]


def call_of(requests: list[Request], images: list[Image]) -> ScoreCall:
    return ScoreCall(
        images, [request.prompt for request in requests], [request.metadata for request in requests]
    )


def scores(requests: list[Request], images: list[Image], rule: str = "strict") -> list[float]:
    items = load_scorer("shapes", {"rule": rule}).score(call_of(requests, images))
    return [float(item.score) for item in items if item.score is not None]


def drawn(*objects: tuple[str, str, float, float, float], background: int = 245) -> Image:
    """(shape, colour, x, y, size) each, on 32 x 32 pixels."""
    image = np.full((32, 32, 3), background, np.float32)
    for shape, colour, x, y, size in objects:
        image += coverage(shape, (x, y), size, (32, 32))[..., None] * (np.array(PALETTE[colour]) - image)
    return image.round().astype(np.uint8)


@pytest.mark.parametrize("rule", RULES)
def test_ground_truth_is_right_in_every_category(
    rule: str, requests: list[Request], renders: list[Image]
) -> None:
    found = np.array(scores(requests, renders, rule)).reshape(len(TAGS), EACH)
    assert found.shape == (len(TAGS), EACH)
    assert found.mean() >= 0.98
    assert found.mean(axis=1).min() >= 0.95
    items = load_scorer("shapes", {"rule": rule}).score(call_of(requests, renders))
    assert np.mean([item.details["exact"] for item in items]) >= 0.98


def test_another_request_than_was_drawn_is_wrong() -> None:
    rng = random.Random(2)
    requests = [training_request(rng) for _ in range(400)]
    renders = [render(request, rng) for request in requests]
    others = [mistaken(request, 0.5, rng) for request in requests]
    pairs = [
        (other, image)
        for request, other, image in zip(requests, others, renders, strict=True)
        # A scene is right for both if nothing but the order of an enumeration differs.
        if set(zip(other.shapes, other.colours or (), strict=False))
        != set(zip(request.shapes, request.colours or (), strict=False))
        and other.colours is not None
    ]
    assert len(pairs) > 100
    assert np.mean(scores([other for other, _ in pairs], [image for _, image in pairs])) < 0.02
    assert np.mean(scores([other for other, _ in pairs], [image for _, image in pairs], "dense")) < 0.75


def noises(count: int) -> Iterator[Image]:
    rng = np.random.default_rng(0)
    for index in range(count):
        noise = rng.normal(128, 90, (32, 32, 3))
        if index % 3:
            noise = cv2.GaussianBlur(noise, (0, 0), 0.7 * (index % 3) + 0.3 * (index % 5))
            noise = 128 + (noise - noise.mean()) * 60 / noise.std()
        if index % 2:
            noise[:] = noise.mean(axis=-1, keepdims=True)
        yield noise.clip(0, 255).astype(np.uint8)


def blanks(count: int) -> Iterator[Image]:
    rng = np.random.default_rng(0)
    for index in range(count):
        first, second = rng.uniform(0, 255, (2, 1, 1, 3))
        ramp = np.linspace(0, 1, 32).reshape((1, 32, 1) if index % 2 else (32, 1, 1))
        yield np.broadcast_to(first + (second - first) * ramp * (index % 4 > 1), (32, 32, 3)).astype(np.uint8)


def grids(count: int) -> Iterator[Image]:
    """Lines, chequers, dots, and sheets that show every shape or one shape many times."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for index in range(count):
        step = int(rng.integers(3, 12))
        if index % 5 == 4:
            side = 3 + index % 2
            places = [
                ((c + 0.5) * 32 / side, (r + 0.5) * 32 / side) for r in range(side) for c in range(side)
            ]
            yield drawn(
                *(
                    (SHAPES[k % 8 if index % 4 else index % 8], COLOURS[(k + index) % 8], cx, cy, 26 / side)
                    for k, (cx, cy) in enumerate(places)
                )
            )
            continue
        pattern = [
            (x % step < 2) | (y % step < 2),
            (x // step + y // step) % 2 == 0,
            (x % step < step // 2) & (y % step < step // 2),
            x % step < step // 2,
        ][index % 5]
        ink, paper = rng.uniform(0, 255, (2, 3))
        yield np.where(pattern[..., None], ink, paper).astype(np.uint8)


@pytest.mark.parametrize("make", [noises, blanks, grids])
@pytest.mark.parametrize("rule", RULES)
def test_what_shows_no_objects_scores_about_nothing(make: Any, rule: str, requests: list[Request]) -> None:
    images = list(make(len(requests)))
    shuffled = random.Random(3).sample(requests, len(requests))
    assert np.mean(scores(shuffled, images, rule)) < 0.02
    assert np.mean([len(find_shapes(image)) for image in images]) < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_named_in_each_colour_at_each_size(shape: str) -> None:
    for colour in COLOURS:
        for size in (9.0, 12.5, 17.0):
            (found,) = find_shapes(drawn((shape, colour, 15.3, 16.8, size)))
            assert (found.name, found.colour) == (shape, colour)
            x1, y1, x2, y2 = found.box
            assert abs((x1 + x2) / 2 - 15.3) < 1.5 and abs((y1 + y2) / 2 - 16.8) < 1.5
            assert 0.7 * size < x2 - x1 < 1.3 * size + 2


def test_boxes_tell_where_objects_are() -> None:
    request = Request("position", ("star", "circle"), ("blue", "green"), relation="left of")
    left = drawn(("star", "blue", 8, 14, 11), ("circle", "green", 23, 17, 11))
    right = drawn(("star", "blue", 23, 14, 11), ("circle", "green", 8, 17, 11))
    assert scores([request] * 2, [left, right]) == [1.0, 0.0]
    assert scores([request] * 2, [left, right], "dense") == [1.0, 0.8]


def test_colours_belong_to_their_shapes() -> None:
    request = Request("color_attr", ("star", "circle"), ("blue", "green"))
    swapped = drawn(("star", "green", 8, 14, 11), ("circle", "blue", 23, 17, 11))
    (item,) = load_scorer("shapes").score(call_of([request], [swapped]))
    assert item.score == 0.0
    assert item.details["objects"] in (["green star", "blue circle"], ["blue circle", "green star"])
    assert "expected blue star" in item.details["reasons"][0]


def test_what_was_not_asked_for_costs_the_exact_mark_alone() -> None:
    request = Request("single_object", ("circle",))
    alone = drawn(("circle", "red", 8, 8, 11))
    crowded = drawn(("circle", "red", 8, 8, 11), ("heart", "red", 23, 22, 11))
    items = load_scorer("shapes").score(call_of([request] * 2, [alone, crowded]))
    assert [item.score for item in items] == [1.0, 1.0]
    assert [item.details["exact"] for item in items] == [1, 0]


def test_one_too_many_is_wrong_when_training_and_right_for_the_evaluation_without_exclude() -> None:
    request = Request("two_object", ("circle", "heart"))
    three = drawn(("circle", "red", 7, 7, 10), ("heart", "red", 23, 23, 10), ("circle", "blue", 23, 7, 10))
    assert [scores([request], [three], rule)[0] for rule in RULES] == [1.0, 0.0, 0.5]


def test_a_crowd_is_nothing() -> None:
    places = [(x, y) for x in (5.5, 16, 26.5) for y in (5.5, 16, 26.5)]
    many = [("circle", "red", x, y, 8.0) for x, y in places]
    assert len(find_shapes(drawn(*many[:MAX_OBJECTS]))) == MAX_OBJECTS
    assert find_shapes(drawn(*many[: MAX_OBJECTS + 1])) == []


def test_batch_invariant_to_the_bit(requests: list[Request], renders: list[Image]) -> None:
    scorer = load_scorer("shapes", {"rule": "dense"})
    assert scorer.batch_invariant
    chosen, images = requests[::40], renders[::40]
    together = scorer.score(call_of(chosen, images))
    alone = [scorer.score(call_of([r], [i]))[0] for r, i in zip(chosen, images, strict=True)]
    backwards = scorer.score(call_of(chosen[::-1], images[::-1]))[::-1]
    assert list(together) == alone == list(backwards)


def test_images_of_other_sizes() -> None:
    images = [np.full((height, width, 3), 200, np.uint8) for height, width in ((1, 1), (2, 9), (64, 48))]
    request = Request("single_object", ("circle",))
    assert scores([request] * 3, images) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "tag"),
        ({"tag": "counting", "include": [{"class": "dog", "count": 1}]}, "'dog'"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "white"}]}, "white"),
    ],
)
def test_what_cannot_be_seen_is_refused(metadata: dict[str, Any], says: str) -> None:
    assert says in (load_scorer("shapes").check("a photo of something", metadata) or "")
    assert load_scorer("shapes").check("", Request("colors", ("ring",), ("red",)).metadata) is None


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule"):
        load_scorer("shapes", {"rule": "lenient"})
