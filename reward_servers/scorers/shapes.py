"""Coloured shapes by the rules of GenEval: from pixels alone.

For small images of a few shapes on a plain background. shapes/detector.py finds the objects with their
colours; geneval/rules.py judges them as it judges those of the large scorer. No network, no weights: 0.4 ms
an image.

Promises
- Batch-invariant: images are looked at one by one.
- A prompt is judged by its metadata, in GenEval's format; classes and colours that the detector cannot tell
  are refused.

Details of an image: `correct` and `reasons` of the rule, `objects` found, and `exact`: 1 where the image is
correct by the strict rule and shows no object that was not asked for, which no rule of GenEval minds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reward_servers.geneval.rules import Detection, judge
from reward_servers.geneval.task import Task, parse_task
from reward_servers.protocol import Metadata
from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.shapes.detector import find_shapes
from reward_servers.shapes.outlines import COLOURS, SHAPES
from reward_servers.wire import ScoreCall


class ShapesOptions(ScorerOptions):
    """Arguments of the `shapes` scorer."""

    rule: Literal["official", "strict", "dense"] = "strict"
    """`official`, GenEval's evaluation; `strict`, exactly as many as asked for, 0 or 1; `dense`, its share of
    partial success."""


def create(args: dict[str, Any], threads: int) -> ShapesScorer:
    return ShapesScorer(ShapesOptions.model_validate(args))


class ShapesScorer(Scorer):
    name = "shapes"
    version = "1"
    batch_invariant = True
    max_batch = 256

    def __init__(self, options: ShapesOptions) -> None:
        self.options = options
        self._rule = options.rule
        self.model = f"outlines of {len(SHAPES)} shapes in {len(COLOURS)} colours"

    def check(self, prompt: str, metadata: Metadata) -> str | None:
        try:
            _task(metadata)
        except ValueError as error:
            return f"metadata: {error}"
        return None

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        return [
            self._one(image, _task(metadata))
            for image, metadata in zip(call.images, call.metadata, strict=True)
        ]

    def warm_up(self) -> None:
        image = np.full((32, 32, 3), 255, np.uint8)
        image[10:20, 10:20] = 0
        find_shapes(image)

    def _one(self, image: NDArray[np.uint8], task: Task) -> ItemScore:
        found = find_shapes(image)
        verdict = judge(task, found, rule=self._rule)
        strict = verdict if self._rule == "strict" else judge(task, found, rule="strict")
        details = {
            "correct": int(verdict.correct),
            "exact": int(strict.correct and _nothing_else(task, found)),
            "objects": [f"{detection.colour} {detection.name}" for detection in found],
            "reasons": list(verdict.reasons),
        }
        return ItemScore(verdict.score, details)


def _task(metadata: Metadata) -> Task:
    return parse_task(metadata, classes=SHAPES, colours=COLOURS)


def _nothing_else(task: Task, found: Sequence[Detection]) -> bool:
    asked: Counter[str] = Counter()
    for requirement in task.include:
        asked[requirement.name] += requirement.count
    return Counter(detection.name for detection in found) == asked
