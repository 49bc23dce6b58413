"""GenEval: does the image show the objects, counts, colours and positions that the metadata asks for?

Objects by Mask2Former (geneval/detector.py), colours by CLIP ViT-L/14 (geneval/colours.py), the verdict by
GenEval's rule or one of the two that models are trained with (geneval/rules.py).

Promises
- The three rules judge the same detections; `rule` says which one is the score, the details have them all.
- Metadata that is not GenEval's, or names a class or colour that cannot be found, is refused.

Details: {tag, correct, official, strict, dense, reasons, detections: [{class, score, box, color}]}; `color`
only of objects whose colour was asked for.

Range: official and strict 0 or 1; dense at most 1, negative for crowds. SD3.5-M: 0.63 official, with mmdet's
weights of the same detector: those served here are of another training run, so numbers differ somewhat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from reward_servers.geneval.classes import CLASSES
from reward_servers.geneval.colours import ColourClassifier
from reward_servers.geneval.detector import Found, Mask2FormerDetector
from reward_servers.geneval.rules import (
    COUNTING_THRESHOLD,
    MAX_OBJECTS,
    POSITION_THRESHOLD,
    THRESHOLD,
    Detection,
    Rule,
    Verdict,
    confident,
    judge,
)
from reward_servers.geneval.task import COLOURS, Task, parse_task
from reward_servers.networks.loading import NeuralOptions, NeuralScorer, neural_options, weights_name
from reward_servers.protocol import Metadata
from reward_servers.scorer import ItemScore
from reward_servers.wire import ScoreCall


class GenevalOptions(NeuralOptions):
    """Arguments of the `geneval` scorer. `revision` is the detector's."""

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """Mask2Former with COCO's 80 classes: local directory or hub id."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP that tells colours: local directory or hub id."""
    clip_revision: str | None = None
    """Commit, tag or branch of `clip`, where it comes from the hub."""
    rule: Rule = "official"
    """What the score is: the evaluation's rule, or a training rule."""
    published_bug: bool = False
    """Score wrong positions in `dense` as the published code does: half as bad (see geneval/rules.py)."""
    threshold: float = Field(default=THRESHOLD, ge=0, lt=1)
    """Objects less confident do not count."""
    counting_threshold: float = Field(default=COUNTING_THRESHOLD, ge=0, lt=1)
    """The same where the tag is `counting`."""
    max_objects: int = Field(default=MAX_OBJECTS, ge=1)
    """Most confident objects of a class that count."""
    position_threshold: float = Field(default=POSITION_THRESHOLD, ge=0, le=1)
    """Part of both objects' sizes by which their centres must be apart."""
    short_side: int = Field(default=800, ge=32, le=2048)
    """Pixels of the shorter side of what the detector sees."""
    long_side: int = Field(default=1333, ge=32, le=4096)
    """At most, of the longer side."""
    max_batch: int = Field(default=8, ge=1)
    """Images, or crops, that go through a network at once."""

    @field_validator("dtype")
    @classmethod
    def _fine_enough(cls, dtype: str) -> str:
        # The detector samples features at fractional positions: 8 bits leave several pixels of error.
        if dtype == "bfloat16":
            raise ValueError("bfloat16 is too coarse for the detector's positions; use float32 or float16")
        return dtype


def create(args: dict[str, Any], threads: int) -> GenevalScorer:
    return GenevalScorer(neural_options(GenevalOptions, args, threads))


class GenevalScorer(NeuralScorer):
    name = "geneval"
    version = "1"

    def __init__(self, options: GenevalOptions) -> None:
        detector = weights_name(options.detector, options.revision)
        super().__init__(options, f"{detector} + {weights_name(options.clip, options.clip_revision)}")
        self._options = options
        self._detector = Mask2FormerDetector(
            options.detector, options, short_side=options.short_side, long_side=options.long_side
        )
        clip_options = options.model_copy(update={"revision": options.clip_revision})
        self._colours = ColourClassifier(options.clip, clip_options)

    def check(self, prompt: str, metadata: Metadata) -> str | None:
        task = _task(metadata)
        return task if isinstance(task, str) else None

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        least = min(self._options.threshold, self._options.counting_threshold)
        images = self._detector.find(call.images, least)
        trials = [
            self._trial(image, found, metadata)
            for image, found, metadata in zip(call.images, images, call.metadata, strict=True)
        ]
        asked = [pair for trial in trials if isinstance(trial, _Trial) for pair in trial.asked]
        colours = iter(self._colours.classify(asked))
        return [self._item(trial, colours) for trial in trials]

    def warm_up(self) -> None:
        image = np.zeros((self._options.short_side, self._options.short_side, 3), np.uint8)
        self._detector.find([image])
        whole = Found(Detection("cup", 1.0, (0, 0, 32, 32)), np.ones(image.shape[:2], np.bool_))
        self._colours.classify([(image, whole)])

    def _trial(
        self, image: NDArray[np.uint8], found: list[Found] | None, metadata: Metadata
    ) -> _Trial | ItemScore:
        task = _task(metadata)
        if isinstance(task, str):
            return ItemScore(None, error=task)
        if found is None:
            return self.not_finite("the detector's output")
        counting = task.tag == "counting"
        kept = confident(
            [one.detection for one in found],
            self._options.counting_threshold if counting else self._options.threshold,
            self._options.max_objects,
        )
        by_detection = {id(one.detection): one for one in found}
        asked = [(image, by_detection[id(detection)]) for detection in _coloured(task, kept)]
        return _Trial(task, kept, asked)

    def _item(self, trial: _Trial | ItemScore, colours: Iterator[str | None]) -> ItemScore:
        """Takes as many of `colours` as the trial asked for."""
        if isinstance(trial, ItemScore):
            return trial
        told = {id(one.detection): next(colours) for _, one in trial.asked}
        if None in told.values():
            return self.not_finite("CLIP's output")
        detections = [replace(detection, colour=told.get(id(detection))) for detection in trial.kept]
        verdicts = {rule: self._judge(trial.task, detections, rule) for rule in get_args(Rule)}
        verdict = verdicts[self._options.rule]
        details = {
            "tag": trial.task.tag,
            "correct": int(verdict.correct),
            **{rule: each.score for rule, each in verdicts.items()},
            "reasons": list(verdict.reasons),
            "detections": [_told(detection) for detection in detections],
        }
        return ItemScore(verdict.score, details)

    def _judge(self, task: Task, detections: Sequence[Detection], rule: Rule) -> Verdict:
        return judge(
            task,
            detections,
            rule=rule,
            published_bug=self._options.published_bug,
            position_threshold=self._options.position_threshold,
        )


@dataclass(frozen=True)
class _Trial:
    """An image before colours are known."""

    task: Task
    kept: Sequence[Detection]
    asked: Sequence[tuple[NDArray[np.uint8], Found]]
    """Objects whose colour decides, with their image."""


def _task(metadata: Metadata) -> Task | str:
    """What is asked for, or why the metadata cannot be judged."""
    try:
        return parse_task(metadata, classes=CLASSES, colours=COLOURS)
    except ValueError as error:
        return f"metadata: {error}"


def _coloured(task: Task, kept: Sequence[Detection]) -> list[Detection]:
    """Those whose colour a rule asks for: the official one asks for all that the training rules do."""
    asked: list[Detection] = []

    def note(detection: Detection) -> str:
        asked.append(detection)
        return ""

    judge(task, kept, colour_of=note, rule="official")
    return asked


def _told(detection: Detection) -> dict[str, Any]:
    told: dict[str, Any] = {"class": detection.name, "score": detection.score, "box": list(detection.box)}
    return told if detection.colour is None else told | {"color": detection.colour}
