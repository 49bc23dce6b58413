"""The scorer: options, refusals, thresholds by tag, details; and the whole of it on tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reward_servers.geneval.colours import ColourClassifier
from reward_servers.geneval.detector import Found, Mask2FormerDetector
from reward_servers.geneval.rules import Detection, confident, judge
from reward_servers.geneval.task import parse_task
from reward_servers.networks.loading import NeuralOptions
from reward_servers.scorer import ItemScore
from reward_servers.scorers import load_scorer, scorer_names
from reward_servers.scorers.geneval import GenevalScorer
from reward_servers.wire import ScoreCall
from tests.unit.reward_servers.networks.tiny_clip import photos

Load = Callable[..., GenevalScorer]


@pytest.fixture(scope="module")
def load(detector_folder: Path, clip_folder: Path) -> Load:
    made: dict[str, GenevalScorer] = {}

    def make(**args: Any) -> GenevalScorer:
        key = json.dumps(args, sort_keys=True)
        if key not in made:
            folders = {"detector": str(detector_folder), "clip": str(clip_folder)}
            scorer = load_scorer("geneval", {**folders, "short_side": 64, "long_side": 100, **args})
            assert isinstance(scorer, GenevalScorer)
            made[key] = scorer
        return made[key]

    return make


def call_of(images: Sequence[NDArray[np.uint8]], *metadata: dict[str, Any]) -> ScoreCall:
    return ScoreCall(images, ["a photo"] * len(images), metadata)


def cups(count: int = 1, tag: str = "single_object", **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": [{"class": "cup", "count": count, **more}]}


class Scene:
    """Stands for detector and classifier: objects are given, with their colours."""

    def __init__(self, scorer: GenevalScorer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[list[Found] | None] = []
        self.colours: dict[int, str | None] = {}
        self.asked: list[tuple[NDArray[np.uint8], Found]] = []
        monkeypatch.setattr(scorer._detector, "find", lambda images, least: self.images)
        monkeypatch.setattr(scorer._colours, "classify", self.classify)

    def object(self, name: str, score: float, colour: str | None = None, x: int = 0) -> Found:
        found = Found(Detection(name, score, (x, 0, x + 10, 10)), np.ones((10, 200), np.bool_))
        self.colours[id(found)] = colour
        return found

    def classify(self, objects: Sequence[tuple[NDArray[np.uint8], Found]]) -> list[str | None]:
        self.asked.extend(objects)
        return [self.colours[id(found)] for _, found in objects]


IMAGES = photos((10, 200), (10, 200), (10, 200))


@pytest.fixture
def score(load: Load, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Score a scene of one image, with options."""

    def run(
        metadata: dict[str, Any], *objects: tuple[str, float] | tuple[str, float, str], **args: Any
    ) -> ItemScore:
        scorer = load(**args)
        scene = Scene(scorer, monkeypatch)
        scene.images = [[scene.object(*told) for told in objects]]
        return scorer.score(call_of(IMAGES[:1], metadata))[0]

    return run


def test_objects_count_from_their_threshold_on(score: Callable[..., ItemScore]) -> None:
    assert score(cups(), ("cup", 0.31)).score == 1
    assert score(cups(), ("cup", 0.3)).score == 0
    assert score(cups(), ("cup", 0.31), threshold=0.5).score == 0


def test_counting_has_a_threshold_of_its_own(score: Callable[..., ItemScore]) -> None:
    two = cups(2, "counting")
    assert score(two, ("cup", 0.95), ("cup", 0.91)).score == 1
    assert score(two, ("cup", 0.95), ("cup", 0.9)).score == 0
    assert score(two, ("cup", 0.95), ("cup", 0.6), counting_threshold=0.5).score == 1


def test_at_most_so_many_objects_of_a_class_count(score: Callable[..., ItemScore]) -> None:
    many = [("cup", 0.95)] * 20
    assert score(cups(16, "counting"), *many, rule="strict").score == 1
    assert score(cups(3, "counting"), *many, rule="strict", max_objects=3).score == 1
    assert score(cups(3, "counting"), *many, rule="strict").score == 0


@pytest.mark.parametrize(("rule", "expected"), [("official", 1), ("strict", 0), ("dense", 0.5)])
def test_the_score_is_the_rules_and_the_details_have_all(
    score: Callable[..., ItemScore], rule: str, expected: float
) -> None:
    metadata = {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "cow", "count": 1}]}
    item = score(metadata, ("cup", 0.9), ("cup", 0.8), ("cow", 0.7), rule=rule)
    assert item.score == expected
    told = item.details
    assert (told["official"], told["strict"], told["dense"]) == (1, 0, 0.5)
    assert told["correct"] == int(rule == "official")
    assert told["reasons"] == ([] if rule == "official" else ["expected cup == 1, found 2"])
    assert told["tag"] == "two_object"
    assert [(each["class"], each["score"]) for each in told["detections"]] == [
        ("cup", 0.9),
        ("cup", 0.8),
        ("cow", 0.7),
    ]
    assert json.loads(json.dumps(told)) == told


def test_the_published_bug_is_an_option(score: Callable[..., ItemScore]) -> None:
    metadata = {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "cup", "count": 1, "position": ["above", 0]}],
    }
    objects = (("cow", 0.9), ("cup", 0.9))
    assert score(metadata, *objects, rule="dense").score == pytest.approx(2 / 3)
    assert score(metadata, *objects, rule="dense", published_bug=True).score == pytest.approx(3 / 4)


def test_the_position_threshold_is_an_option(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "cup", "count": 1, "position": ["right of", 0]}],
    }
    for threshold, expected in ((0.1, 0), (0.0, 1)):
        scorer = load(position_threshold=threshold)
        scene = Scene(scorer, monkeypatch)
        scene.images = [[scene.object("cow", 0.9), scene.object("cup", 0.9, x=2)]]
        assert scorer.score(call_of(IMAGES[:1], metadata))[0].score == expected


def test_colours_go_to_the_image_they_were_asked_of(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load()
    scene = Scene(scorer, monkeypatch)
    sure, unsure = scene.object("cup", 0.9, "red"), scene.object("cup", 0.5, "blue")
    other, cow = scene.object("cup", 0.9, "blue"), scene.object("cow", 0.9, "red")
    scene.images = [[unsure, sure], [cow], [other, cow]]
    items = scorer.score(call_of(IMAGES, *[cups(tag="colors", color="red")] * 3))
    assert [item.score for item in items] == [1, 0, 0]
    # Only cups, only as many as are asked for, each with its own image.
    assert [found for _, found in scene.asked] == [sure, other]
    assert scene.asked[0][0] is IMAGES[0] and scene.asked[1][0] is IMAGES[2]
    assert [each.get("color") for each in items[0].details["detections"]] == ["red", None]
    assert items[2].details["reasons"] == ["expected red cup == 1, found 1 blue"]


def test_what_cannot_be_scored_is_an_error_of_that_item(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load()
    scene = Scene(scorer, monkeypatch)
    scene.images = [None, [scene.object("cup", 0.9, None)], [scene.object("cup", 0.9, "red")]]
    red = cups(tag="colors", color="red")
    items = scorer.score(call_of(IMAGES, red, red, red))
    assert [item.score for item in items] == [None, None, 1]
    assert "detector's output is not finite in float32" in (items[0].error or "")
    assert "CLIP's output is not finite in float32" in (items[1].error or "")
    scene.images = [[], [scene.object("cup", 0.9, "red")]]
    items = scorer.score(call_of(IMAGES[:2], {}, red))
    assert [item.score for item in items] == [None, 1]
    assert "metadata: tag" in (items[0].error or "")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "metadata: tag: expected one of single_object, two_object"),
        ({"target": "word"}, "metadata: tag"),
        ({"tag": "colors"}, "metadata: include"),
        (cups(tag="colors", color="beige"), "color: expected one of red, orange"),
        ({"tag": "counting", "include": [{"class": "mouse", "count": 1}]}, "'mouse' is no class"),
        (cups(0), "count: expected a whole number of at least 1"),
    ],
)
def test_metadata_that_can_never_be_scored(load: Load, metadata: dict[str, Any], says: str) -> None:
    scorer = load()
    assert says in (scorer.check("a photo", metadata) or "")
    assert scorer.check("a photo", cups()) is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"rule": "lenient"}, "rule"),
        ({"threshold": 1.5}, "threshold"),
        ({"nms": 0.5}, "nms"),
        ({"dtype": "bfloat16"}, "too coarse for the detector's positions"),
        ({"detector": "/not/there"}, "/not/there"),
        ({"clip": "/not/there"}, "/not/there"),
    ],
)
def test_arguments_that_are_refused(load: Load, args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(**args)


def test_is_registered_and_names_its_weights(load: Load, detector_folder: Path, clip_folder: Path) -> None:
    assert "geneval" in scorer_names()
    scorer = load(max_batch=3)
    scorer.warm_up()
    assert scorer.model == f"{detector_folder} + {clip_folder}"
    assert scorer.max_batch == 3
    assert scorer.batch_invariant is False


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_whole_on_tiny_checkpoints(load: Load, detector_folder: Path, clip_folder: Path, dtype: Any) -> None:
    """Objects and colours of random networks, judged step by step."""
    options = NeuralOptions(dtype=dtype)
    detector = Mask2FormerDetector(str(detector_folder), options, short_side=64, long_side=100)
    classifier = ColourClassifier(str(clip_folder), options)
    scorer = load(threshold=0.02, dtype=dtype, max_batch=1)
    images = photos((64, 64), (75, 90), (40, 50))
    scored = 0
    for image in images:
        (every,) = detector.find([image])
        assert every is not None
        kept = confident([found.detection for found in every], 0.02)
        assert len(kept) > 3
        best = next(found for found in every if found.detection is kept[0])
        (colour,) = classifier.classify([(image, best)])
        for asked in ("red", colour):
            metadata = {"tag": "colors", "include": [{"class": kept[0].name, "count": 1, "color": asked}]}
            expected = judge(
                parse_task(metadata), kept, colour_of=lambda _, told=colour: told or "", rule="official"
            )
            (item,) = scorer.score(call_of([image], metadata))
            assert item.score == expected.score
            told = [(each["class"], each["score"]) for each in item.details["detections"]]
            assert told == [(d.name, pytest.approx(d.score)) for d in kept]
            scored += int(expected.correct)
    assert scored >= len(images)


def test_every_image_of_a_call_is_scored(load: Load) -> None:
    images = photos((64, 64), (75, 90), (40, 50), (64, 64))
    items = load(threshold=0.02).score(call_of(images, *[cups(tag="colors", color="red")] * 4))
    assert [item.error for item in items] == [None] * 4
    assert all(item.score in (0, 1) for item in items)
    assert torch.is_grad_enabled()
