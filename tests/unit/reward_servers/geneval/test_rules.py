"""Every category, under every rule, on detections made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_servers.geneval.rules import Box, Detection, Rule, confident, judge, relations, told_colour
from reward_servers.geneval.task import parse_task

RULES: tuple[Rule, ...] = ("official", "strict", "dense")

LEFT: Box = (0, 0, 10, 10)
RIGHT: Box = (50, 0, 60, 10)
BELOW: Box = (0, 50, 10, 60)


def seen(name: str, colour: str | None = None, box: Box = LEFT, score: float = 0.8) -> Detection:
    return Detection(name, score, box, colour)


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


SINGLE = {"tag": "single_object", "include": [clause("cup")]}
TWO = {"tag": "two_object", "include": [clause("cup"), clause("cow")]}
COUNTING = {"tag": "counting", "include": [clause("cup", 3)], "exclude": [clause("cup", 4)]}
COLOURS = {"tag": "colors", "include": [clause("cup", color="red")]}
POSITION = {"tag": "position", "include": [clause("cow"), clause("cup", position=["left of", 0])]}
COLOUR_ATTR = {"tag": "color_attr", "include": [clause("cup", color="red"), clause("cow", color="blue")]}
TWO_RED = {"tag": "colors", "include": [clause("cup", 2, color="red")]}
RED_LEFT = {
    "tag": "position",
    "include": [clause("cow", color="blue"), clause("cup", color="red", position=["left of", 0])],
}

COW = seen("cow", box=RIGHT)


@pytest.mark.parametrize(
    ("metadata", "detections", "official", "strict", "dense"),
    [
        (SINGLE, [seen("cup")], 1, 1, 1),
        (SINGLE, [], 0, 0, 0),
        (SINGLE, [seen("cow")], 0, 0, 0),
        (SINGLE, [seen("cup"), seen("cow")], 1, 1, 1),
        (SINGLE, [seen("cup")] * 2, 1, 0, 0),
        (SINGLE, [seen("cup")] * 4, 1, 0, -2),
        (TWO, [seen("cup"), seen("cow")], 1, 1, 1),
        (TWO, [seen("cup")], 0, 0, 0.5),
        (TWO, [seen("cup"), seen("cow"), seen("cow")], 1, 0, 0.5),
        (COUNTING, [seen("cup")] * 3, 1, 1, 1),
        (COUNTING, [seen("cup")] * 2, 0, 0, 2 / 3),
        (COUNTING, [seen("cup")] * 4, 0, 0, 2 / 3),
        (COUNTING, [seen("cup")] * 9, 0, 0, -1),
        (COLOURS, [seen("cup", "red")], 1, 1, 1),
        (COLOURS, [seen("cup", "blue")], 0, 0, 0.5),
        (COLOURS, [], 0, 0, 0),
        # Two cups: the count's term is 0, and the colour's is a 0 of its own.
        (COLOURS, [seen("cup", "red")] * 2, 1, 0, 0),
        (TWO_RED, [seen("cup", "red"), seen("cup", "blue")], 0, 0, 0.75),
        (TWO_RED, [seen("cup", "red")], 0, 0, 0.25),
        (COLOUR_ATTR, [seen("cup", "red"), seen("cow", "blue")], 1, 1, 1),
        (COLOUR_ATTR, [seen("cup", "blue"), seen("cow", "red")], 0, 0, 0.5),
        (COLOUR_ATTR, [seen("cup", "red"), seen("cow", "red")], 0, 0, 0.75),
        (COLOUR_ATTR, [seen("cup", "red")], 0, 0, 0.5),
        (POSITION, [seen("cup"), COW], 1, 1, 1),
        (POSITION, [seen("cup", box=BELOW), seen("cow")], 0, 0, 2 / 3),
        (POSITION, [seen("cup")], 0, 0, 1 / 3),
        (POSITION, [COW], 0, 0, 1 / 3),
        (RED_LEFT, [seen("cup", "red"), seen("cow", "blue", RIGHT)], 1, 1, 1),
        # A wrong colour leaves no term for the position; as a target it gives one 0.
        (RED_LEFT, [seen("cup", "blue"), seen("cow", "blue", RIGHT)], 0, 0, 3 / 4),
        (RED_LEFT, [seen("cup", "red"), seen("cow", "red", RIGHT)], 0, 0, 3 / 5),
    ],
)
def test_each_category(
    metadata: dict[str, Any], detections: list[Detection], official: float, strict: float, dense: float
) -> None:
    task = parse_task(metadata)
    scores = [judge(task, detections, rule=rule).score for rule in RULES]
    assert scores == pytest.approx([official, strict, dense])


@pytest.mark.parametrize(
    ("metadata", "detections", "published", "mended"),
    [
        # The terms are 1, 1, then 0 and 1 as published, or 0 alone.
        (POSITION, [seen("cup", box=BELOW), seen("cow")], 3 / 4, 2 / 3),
        (POSITION, [seen("cup"), COW], 1, 1),
        # A target that was not matched gives one 0 either way.
        (POSITION, [seen("cup"), COW, COW], 1 / 3, 1 / 3),
        (POSITION, [], 0, 0),
    ],
)
def test_the_published_dense_rule_halves_the_penalty_of_a_wrong_position(
    metadata: dict[str, Any], detections: list[Detection], published: float, mended: float
) -> None:
    task = parse_task(metadata)
    bugs = [judge(task, detections, rule="dense", published_bug=bug).score for bug in (True, False)]
    assert bugs == pytest.approx([published, mended])


@pytest.mark.parametrize("rule", ("official", "strict"))
def test_the_bug_is_of_the_dense_rule_alone(rule: Rule) -> None:
    task = parse_task(POSITION)
    assert judge(task, [seen("cup", box=BELOW), seen("cow")], rule=rule, published_bug=True).score == 0


def test_the_official_rule_looks_at_the_most_confident_only() -> None:
    sure_red = [seen("cup", "blue", score=0.5), seen("cup", "red", score=0.9)]
    sure_blue = [seen("cup", "blue", score=0.9), seen("cup", "red", score=0.5)]
    task = parse_task(COLOURS)
    assert judge(task, sure_red, rule="official").correct
    assert not judge(task, sure_blue, rule="official").correct


def test_every_pair_of_objects_must_be_placed_right() -> None:
    metadata = {"tag": "position", "include": [clause("cow", 2), clause("cup", position=["left of", 0])]}
    task = parse_task(metadata)
    assert judge(task, [seen("cup"), COW, seen("cow", box=(80, 0, 90, 10))], rule="strict").correct
    verdict = judge(task, [seen("cup"), COW, seen("cow", box=BELOW)], rule="strict")
    assert not verdict.correct
    assert verdict.reasons == ("expected cup left of target, found above",)


def test_exclude_is_of_the_official_rule_alone() -> None:
    task = parse_task({"tag": "two_object", "include": [clause("cup")], "exclude": [clause("cow", 2)]})
    cows = [seen("cow")]
    assert [judge(task, [seen("cup"), *cows], rule=rule).score for rule in RULES] == [1, 1, 1]
    assert [judge(task, [seen("cup"), *cows * 2], rule=rule).score for rule in RULES] == [0, 1, 1]


def test_reasons_tell_every_mistake() -> None:
    verdict = judge(parse_task(COLOUR_ATTR), [seen("cup", "pink")], rule="strict")
    assert verdict.reasons == ("expected red cup == 1, found 1 pink", "expected cow == 1, found 0")


def test_colours_are_asked_only_where_they_matter() -> None:
    asked: list[str] = []

    def colour_of(detection: Detection) -> str:
        asked.append(detection.name)
        return "red"

    task = parse_task(COLOUR_ATTR)
    judge(task, [seen("cup"), seen("cow"), seen("cow"), seen("dog")], colour_of=colour_of, rule="strict")
    assert asked == ["cup"]


def test_a_colour_that_nobody_told_is_an_error() -> None:
    with pytest.raises(ValueError, match="no colour was told of cup"):
        told_colour(seen("cup"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        (BELOW, LEFT, {"below"}),
        (LEFT, BELOW, {"above"}),
        ((50, 50, 60, 60), LEFT, {"right of", "below"}),
        (LEFT, (50, 50, 60, 60), {"left of", "above"}),
        (LEFT, LEFT, set()),
        # 0.1 * (10 + 10) is 2: centres 2 apart are in no relation; further apart, one holds from 4 on.
        ((2, 0, 12, 10), LEFT, set()),
        ((3.9, 0, 13.9, 10), LEFT, set()),
        ((4.1, 0, 14.1, 10), LEFT, {"right of"}),
        # 30 degrees off: sin is 0.5, which is not more than 0.5 once the sizes are off.
        ((100, 57, 110, 67), LEFT, {"right of"}),
        ((100, 70, 110, 80), LEFT, {"right of", "below"}),
        # Large objects must be further apart.
        ((60, 0, 260, 200), (0, 0, 200, 200), set()),
        ((100, 0, 300, 200), (0, 0, 200, 200), {"right of"}),
    ],
)
def test_relations(a: Box, b: Box, expected: set[str]) -> None:
    assert relations(a, b) == expected


def test_the_position_threshold_is_the_callers() -> None:
    assert relations((3, 0, 13, 10), LEFT, threshold=0.0) == {"right of"}
    detections = [seen("cup"), seen("cow", box=(3, 0, 13, 10))]
    task = parse_task(POSITION)
    assert not judge(task, detections, rule="strict").correct
    assert judge(task, detections, rule="strict", position_threshold=0.0).correct


SIDES = st.tuples(*[st.integers(0, 100)] * 2, *[st.integers(1, 60)] * 2)


@given(SIDES, SIDES)
def test_relations_are_the_published_formula(
    first: tuple[int, int, int, int], second: tuple[int, int, int, int]
) -> None:
    a, b = (np.array([x, y, x + w, y + h], float) for x, y, w, h in (first, second))
    offset = (a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2
    rev = np.maximum(abs(offset) - 0.1 * (a[2:] - a[:2] + b[2:] - b[:2]), 0) * np.sign(offset)
    dx, dy = rev / np.linalg.norm(offset) if (abs(rev) >= 1e-3).any() else (0, 0)
    expected = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    assert relations(tuple(a), tuple(b)) == {relation for relation, holds in expected.items() if holds}


def test_confident_keeps_what_is_above_the_threshold_and_not_too_many() -> None:
    detections = [seen("cup", score=score) for score in (0.3, 0.9, 0.31, 0.5)] + [seen("cow", score=0.4)]
    kept = confident(detections, 0.3, max_objects=2)
    assert [(d.name, d.score) for d in kept] == [("cup", 0.9), ("cup", 0.5), ("cow", 0.4)]


def broken(**changes: Any) -> dict[str, Any]:
    return {**POSITION, **changes}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "tag: expected one of single_object"),
        (broken(tag="couting"), "found 'couting'"),
        (broken(tag=["counting"]), "tag: expected"),
        (broken(include=None), "include: expected a list"),
        ({"tag": "counting"}, "include: expected a list"),
        (broken(include=[]), "at least one object"),
        (broken(include=["cup"]), r"include\[0\]: expected an object"),
        (broken(include=[{"count": 1}]), r"include\[0\].class"),
        (broken(include=[{"class": "cup"}]), r"include\[0\].count"),
        (broken(include=[clause("cup", 0)]), "at least 1; found 0"),
        (broken(include=[clause("cup", -1)]), "at least 1; found -1"),
        (broken(include=[clause("cup", True)]), "at least 1; found True"),
        (broken(include=[clause("cup", 1.0)]), "whole number"),
        (broken(include=[clause("cup", colour="red")]), "unknown key 'colour'; valid: class, count, color"),
        (broken(include=[clause("cup", color=None)]), "color: expected a text"),
        (broken(include=[clause("cup"), clause("cow", position=["near", 0])]), "left of.*found 'near'"),
        (broken(include=[clause("cup"), clause("cow", position=[["above"], 0])]), "found .'above'."),
        (broken(include=[clause("cup"), clause("cow", position="above")]), "expected .relation, index."),
        (broken(include=[clause("cup"), clause("cow", position=["above", 1])]), "earlier object; found 1"),
        (broken(include=[clause("cup"), clause("cow", position=["above", -1])]), "earlier object; found -1"),
        (broken(include=[clause("cup", position=["above", 0])]), r"include\[0\].position.*earlier"),
        (broken(exclude={"class": "cup"}), "exclude: expected a list"),
        (broken(exclude=[clause("cup", color="red")]), "unknown key 'color'; valid: class, count"),
    ],
)
def test_metadata_that_cannot_be_judged(metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_task(metadata)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"classes": ("cow",)}, r"include\[0\].class: 'cup' is no class"),
        ({"colours": ("blue",)}, r"include\[0\].color: expected one of blue; found 'red'"),
        ({"tags": ("shapes",)}, "tag: expected one of shapes"),
    ],
)
def test_what_is_looked_for_is_the_callers(limits: dict[str, Any], says: str) -> None:
    parse_task(COLOURS)
    with pytest.raises(ValueError, match=says):
        parse_task(COLOURS, **limits)


def test_keys_beside_the_task_belong_to_other_rewards() -> None:
    assert parse_task({**SINGLE, "prompt": "a photo of a cup", "target": "x"}) == parse_task(SINGLE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cups", (0, 1, 2))
def test_what_is_not_correct_has_a_reason(rule: Rule, cups: int) -> None:
    verdict = judge(parse_task(SINGLE), [seen("cup")] * cups, rule=rule)
    assert verdict.correct == (not verdict.reasons)
