"""Ground truth of shapes follows from request and random state, and shows nothing that is held out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from quickstart.shapes.combinations import colour_is_heldout
from quickstart.shapes.render import HEIGHT, QUARTER, WIDTH, render
from quickstart.shapes.requests import Request, any_request, training_request
from reward_servers.geneval.rules import judge, relations
from reward_servers.geneval.task import TAGS, parse_task
from reward_servers.shapes.detector import find_shapes


def test_an_image_follows_from_request_and_random_state() -> None:
    request = Request("position", ("star", "circle"), ("blue", "green"), relation="left of")
    image = render(request, random.Random(5))
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert np.array_equal(image, render(request, random.Random(5)))
    assert not np.array_equal(image, render(request, random.Random(6)))


def test_renders_show_what_is_asked_for_and_nothing_else() -> None:
    rng = random.Random(0)
    right = []
    for index in range(300):
        request = any_request(TAGS[index % len(TAGS)], rng)
        found = find_shapes(render(request, rng))
        task = parse_task(request.metadata)
        right.append(
            judge(task, found, rule="strict").correct and len(found) == sum(r.count for r in task.include)
        )
    assert np.mean(right) >= 0.98


def test_training_images_show_no_held_out_colour_even_where_none_is_told() -> None:
    rng = random.Random(0)
    shown = [d for _ in range(300) for d in find_shapes(render(training_request(rng), rng))]
    assert len(shown) > 400
    assert not [d for d in shown if d.colour is None or colour_is_heldout(d.name, d.colour)]


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_relations_are_plain(relation: str) -> None:
    rng = random.Random(0)
    request = Request("position", ("star", "circle"), relation=relation)
    for _ in range(20):
        boxes = {d.name: d.box for d in find_shapes(render(request, rng))}
        assert relations(boxes["star"], boxes["circle"]) == {relation}


def test_every_object_keeps_to_a_quarter_of_its_own() -> None:
    rng = random.Random(0)
    for index in range(120):
        found = find_shapes(render(any_request(TAGS[index % len(TAGS)], rng), rng))
        quarters = [
            ((d.box[0] + d.box[2]) // (2 * QUARTER), (d.box[1] + d.box[3]) // (2 * QUARTER)) for d in found
        ]
        assert len(set(quarters)) == len(found)
        for (column, row), (left, top, right, bottom) in zip(quarters, [d.box for d in found], strict=True):
            assert QUARTER * column <= left and right <= QUARTER * (column + 1)
            assert QUARTER * row <= top and bottom <= QUARTER * (row + 1)


def test_what_is_left_open_varies() -> None:
    rng = random.Random(0)
    images = [render(Request("single_object", ("circle",)), rng) for _ in range(60)]
    found = [find_shapes(image)[0] for image in images]
    assert len({d.colour for d in found}) == 6  # of 8, those that are trained
    assert np.std([d.box[0] for d in found]) > 3 and np.std([d.box[2] - d.box[0] for d in found]) > 0.5
    assert np.std([image[0, 0] for image in images], axis=0).min() > 3
