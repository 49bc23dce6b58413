"""Requests for shapes follow from their seed alone, and held-out combinations are never trained."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickstart.shapes.combinations import (
    NUMBERS,
    alone_is_heldout,
    colour_is_heldout,
    companion_is_heldout,
    number_is_heldout,
)
from quickstart.shapes.requests import Request, heldout_requests, mistaken, training_request
from reward_servers.geneval.task import TAGS, parse_task
from reward_servers.shapes.outlines import COLOURS, SHAPES

Combination = tuple[str, ...]


def combinations_of(request: Request) -> set[Combination]:
    """Read off the metadata: what the request brings together."""
    include = request.metadata["include"]
    found: set[Combination] = {("colour", c["class"], c["color"]) for c in include if "color" in c}
    found |= {("number", c["class"], str(c["count"])) for c in include if c["count"] > 1}
    if len(include) == 2:
        found.add(("companions", *sorted(c["class"] for c in include)))
    return found or {("alone", include[0]["class"])}


HELDOUT: set[Combination] = {
    *(("colour", s, c) for s, c in product(SHAPES, COLOURS) if colour_is_heldout(s, c)),
    *(("number", s, str(n)) for s, n in product(SHAPES, NUMBERS) if number_is_heldout(s, n)),
    *(("companions", *sorted(pair)) for pair in combinations(SHAPES, 2) if companion_is_heldout(*pair)),
    *(("alone", s) for s in SHAPES if alone_is_heldout(s)),
}


@given(st.integers(0, 2**32))
def test_training_requests_hold_nothing_that_is_held_out(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        request = training_request(rng)
        assert not combinations_of(request) & HELDOUT
        assert not combinations_of(mistaken(request, 0.5, rng)) & HELDOUT


def test_held_out_requests_hold_a_combination_that_is_held_out() -> None:
    requests = heldout_requests(600, seed=99)
    assert all(combinations_of(request) & HELDOUT for request in requests)
    assert Counter(request.tag for request in requests) == dict.fromkeys(TAGS, 100)


def test_every_held_out_combination_is_evaluated_and_every_other_one_trained() -> None:
    rng = random.Random(0)
    trained = set[Combination]().union(*(combinations_of(training_request(rng)) for _ in range(4000)))
    evaluated = set[Combination]().union(*(combinations_of(r) for r in heldout_requests(480, seed=99)))
    everything: set[Combination] = {
        *(("colour", s, c) for s, c in product(SHAPES, COLOURS)),
        *(("number", s, str(n)) for s, n in product(SHAPES, NUMBERS)),
        *(("companions", *sorted(pair)) for pair in combinations(SHAPES, 2)),
        *(("alone", s) for s in SHAPES),
    }
    assert trained == everything - HELDOUT
    assert evaluated >= HELDOUT


def test_each_shape_and_colour_keeps_most_of_its_combinations() -> None:
    for shape in SHAPES:
        assert sum(colour_is_heldout(shape, colour) for colour in COLOURS) == 2
        assert sum(companion_is_heldout(shape, other) for other in SHAPES if other != shape) == 2
        assert sum(number_is_heldout(shape, number) for number in NUMBERS) == 1
    for colour in COLOURS:
        assert sum(colour_is_heldout(shape, colour) for shape in SHAPES) == 2
    assert all(companion_is_heldout(a, b) == companion_is_heldout(b, a) for a, b in permutations(SHAPES, 2))
    assert sum(map(alone_is_heldout, SHAPES)) == 2


def test_held_out_requests_are_the_same_for_a_seed_and_few_begin_many() -> None:
    requests = heldout_requests(300, seed=3)
    assert requests[:100] == heldout_requests(100, seed=3)
    assert requests != heldout_requests(300, seed=4)


def test_requests_repeat_only_where_there_are_no_others() -> None:
    requests = heldout_requests(600, seed=99)
    kinds = {tag: Counter(r for r in requests if r.tag == tag) for tag in TAGS}
    assert {tag: len(kinds[tag]) for tag in ("single_object", "two_object", "colors")} == {
        "single_object": 2,
        "two_object": 16,
        "colors": 16,
    }
    for tag in ("single_object", "two_object", "colors"):
        times = kinds[tag].values()
        assert max(times) - min(times) <= 1
    assert len(kinds["color_attr"]) > 95


def test_the_prompt_space_is_large() -> None:
    rng = random.Random(0)
    assert len({training_request(rng).prompt for _ in range(4000)}) > 800


def test_requests_are_the_same_in_every_release() -> None:
    # Resuming a run under a newer release must not change what its ordinals mean.
    rng = random.Random("pinned")
    assert [training_request(rng).prompt for _ in range(3)] == [
        "a photo of four crosses",
        "a photo of a black diamond and a red ring",
        "a photo of a red circle and a green cross",
    ]


@given(st.integers(0, 2**32))
def test_metadata_is_what_the_scorer_judges(seed: int) -> None:
    request = training_request(random.Random(seed))
    task = parse_task(request.metadata, classes=SHAPES, colours=COLOURS)
    assert task.tag == request.tag
    assert sum(requirement.count for requirement in task.include) == len(request.shapes) * request.number


@pytest.mark.parametrize(
    ("request_", "prompt", "include"),
    [
        (
            Request("single_object", ("circle",)),
            "a photo of a circle",
            [{"class": "circle", "count": 1}],
        ),
        (
            Request("colors", ("star",), ("orange",)),
            "a photo of an orange star",
            [{"class": "star", "count": 1, "color": "orange"}],
        ),
        (
            Request("counting", ("cross",), number=4),
            "a photo of four crosses",
            [{"class": "cross", "count": 4}],
        ),
        (
            Request("color_attr", ("ring", "heart"), ("red", "blue")),
            "a photo of a red ring and a blue heart",
            [
                {"class": "ring", "count": 1, "color": "red"},
                {"class": "heart", "count": 1, "color": "blue"},
            ],
        ),
        (
            Request("position", ("ring", "heart"), relation="above"),
            "a photo of a ring above a heart",
            [{"class": "heart", "count": 1}, {"class": "ring", "count": 1, "position": ["above", 0]}],
        ),
    ],
)
def test_prompts_read_as_in_geneval(request_: Request, prompt: str, include: object) -> None:
    assert request_.prompt == prompt
    assert request_.metadata["include"] == include


def test_mistakes_are_as_frequent_as_asked_for() -> None:
    rng = random.Random(0)
    pairs = [(request, mistaken(request, 0.2, rng)) for request in map(training_request, [rng] * 4000)]
    words = [
        (before, after)
        for request, changed in pairs
        for before, after in zip(_words(request), _words(changed), strict=True)
    ]
    assert 0.18 < sum(before != after for before, after in words) / len(words) < 0.22
    assert all(mistaken(request, 0.0, rng) == request for request, _ in pairs[:50])


def _words(request: Request) -> list[str]:
    told = [*request.shapes, *(request.colours or ())]
    told += [str(request.number)] if request.number > 1 else []
    return told + ([request.relation] if request.relation is not None else [])


def test_a_held_out_request_gets_no_mistakes() -> None:
    with pytest.raises(ValueError, match="held out"):
        mistaken(heldout_requests(1, seed=0)[0], 0.5, random.Random(0))
