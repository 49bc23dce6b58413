"""The rules of GenEval: whether the objects found in an image are those that its prompt asks for.

Three rules, over the same detections:

- `official`, the evaluation. Of each class the `count` most confident objects are taken and there must be as
  many; colour and position are asked of those only; `exclude` fails where at least its count is found.
- `strict`, for training: exactly `count` objects; colour and position are asked of all of them; `exclude` is
  ignored. 0 or 1.
- `dense`, for training: the mean of these terms, and correct where `strict` is:
    count     1 - |count - found| / count, negative where more than twice as many are found
    colour    1 - |count - found in that colour| / count, where the count is right
    position  1 or 0, where count and colour are right
    0         once, where the count is wrong and a colour or a position is asked for

**The published dense rule has a bug.** Where a position is wrong it adds the term 0 and then, as where it is
right, the term 1 (`rewards.append(1.0)` stands behind the loop over the pairs, whether or not that was left
early): the mistake costs half of what it should. `published_bug=True` does the same; the default adds the 0
only. A target that was itself not matched gives one 0 in both.

Promises
- Pure and free of any detector: what finds the objects, and what tells a colour, is the caller's.
- What cannot be judged is refused by `parse_task` (task.py).

Source: GenEval (arXiv 2310.11513), `evaluation/evaluate_images.py`; the training rules are those of
`reward_server/gen_eval.py` of Flow-GRPO (arXiv 2505.05470), which DGPO (arXiv 2510.08425) trains with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from reward_servers.geneval.task import Requirement, Task

Rule = Literal["official", "strict", "dense"]
Box = tuple[float, float, float, float]

POSITION_THRESHOLD: Final = 0.1
"""Part of both objects' size by which their centres must be apart before a relation holds."""
THRESHOLD: Final = 0.3
"""Detections less confident do not count."""
COUNTING_THRESHOLD: Final = 0.9
"""The same, where the tag is `counting`."""
MAX_OBJECTS: Final = 16
"""Of one class that are looked at."""
_DIRECTION_THRESHOLD: Final = 0.5
_NO_OFFSET: Final = 1e-3


@dataclass(frozen=True)
class Detection:
    """One object in an image."""

    name: str
    """Its class."""
    score: float
    """Confidence; orders the objects of a class."""
    box: Box
    """x1, y1, x2, y2 in pixels, y downwards."""
    colour: str | None = None
    """Where whoever found it knows."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of an image."""

    score: float
    """0 or 1; of `dense` at most 1, and negative for crowds."""
    correct: bool
    """By `official`, or by `strict` for both training rules."""
    reasons: tuple[str, ...] = ()
    """What is wrong; empty where it is correct."""


def confident(
    detections: Sequence[Detection], threshold: float, max_objects: int = MAX_OBJECTS
) -> list[Detection]:
    """Those more confident than `threshold`, most confident first, at most `max_objects` of each class.

    The evaluation's overlap threshold is 1, so overlapping objects are all kept.
    """
    counts: Counter[str] = Counter()
    kept = []
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        counts[detection.name] += 1
        if detection.score > threshold and counts[detection.name] <= max_objects:
            kept.append(detection)
    return kept


def told_colour(detection: Detection) -> str:
    """The colour that came with a detection."""
    if detection.colour is None:
        raise ValueError(f"no colour was told of {detection.name} at {detection.box}")
    return detection.colour


def relations(a: Box, b: Box, threshold: float = POSITION_THRESHOLD) -> frozenset[str]:
    """How `a` lies relative to `b`; several may hold, or none.

    The offset of the centres, less `threshold` of both sizes, by the length of the whole offset: a relation
    holds where that is more than 0.5 in its direction.

    >>> sorted(relations((30, 30, 40, 40), (0, 0, 10, 10)))
    ['below', 'right of']
    """
    offset = [(a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis]) for axis in (0, 1)]
    revised = [
        math.copysign(max(abs(distance) - threshold * size, 0.0), distance)
        for distance, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(distance) < _NO_OFFSET for distance in revised):
        return frozenset()
    dx, dy = (distance / math.hypot(*offset) for distance in revised)
    holds = {
        "left of": dx < -_DIRECTION_THRESHOLD,
        "right of": dx > _DIRECTION_THRESHOLD,
        "above": dy < -_DIRECTION_THRESHOLD,
        "below": dy > _DIRECTION_THRESHOLD,
    }
    return frozenset(relation for relation, true in holds.items() if true)


def judge(
    task: Task,
    detections: Sequence[Detection],
    *,
    colour_of: Callable[[Detection], str] = told_colour,
    rule: Rule,
    published_bug: bool = False,
    position_threshold: float = POSITION_THRESHOLD,
) -> Verdict:
    """What `rule` says of an image.

    Args:
        task: what the prompt asks for.
        detections: of the image, any order, confident enough to count.
        colour_of: asked only of detections whose colour matters.
        published_bug: of the dense rule, see above; no other rule reads it.
        position_threshold: see `relations`.
    """
    trial = _Trial(detections, colour_of, rule, published_bug, position_threshold)
    for requirement in task.include:
        trial.require(requirement)
    if rule == "official":
        trial.exclude(task.exclude)
    correct = not trial.reasons
    score = sum(trial.terms) / len(trial.terms) if rule == "dense" else float(correct)
    return Verdict(score, correct, tuple(trial.reasons))


@dataclass
class _Trial:
    detections: Sequence[Detection]
    colour_of: Callable[[Detection], str]
    rule: Rule
    published_bug: bool
    position_threshold: float
    terms: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    matched: list[Sequence[Detection] | None] = field(default_factory=list)
    """Of each requirement so far; None where it failed."""

    def require(self, requirement: Requirement) -> None:
        found = self._found(requirement.name)
        if self.rule == "official":
            found = found[: requirement.count]
        met = self._count(requirement, found)
        if met and requirement.colour is not None:
            met = self._colour(requirement, requirement.colour, found)
        if met and requirement.relation is not None and requirement.target is not None:
            met = self._relation(requirement, requirement.relation, self.matched[requirement.target], found)
        self.matched.append(found if met else None)

    def exclude(self, clauses: Sequence[Requirement]) -> None:
        for clause in clauses:
            found = len(self._found(clause.name))
            if found >= clause.count:
                self.reasons.append(f"expected {clause.name} < {clause.count}, found {found}")

    def _found(self, name: str) -> list[Detection]:
        """Most confident first."""
        return sorted((d for d in self.detections if d.name == name), key=lambda d: d.score, reverse=True)

    def _count(self, requirement: Requirement, found: Sequence[Detection]) -> bool:
        count = requirement.count
        self.terms.append(1 - abs(count - len(found)) / count)
        if len(found) == count:  # of the official rule at most `count` are looked at
            return True
        sign = ">=" if self.rule == "official" else "=="
        self.reasons.append(f"expected {requirement.name} {sign} {count}, found {len(found)}")
        if requirement.colour is not None or requirement.relation is not None:
            self.terms.append(0.0)
        return False

    def _colour(self, requirement: Requirement, colour: str, found: Sequence[Detection]) -> bool:
        colours = Counter(self.colour_of(detection) for detection in found)
        self.terms.append(1 - abs(requirement.count - colours[colour]) / requirement.count)
        if colours[colour] == requirement.count:
            return True
        seen = ", ".join(f"{number} {name}" for name, number in colours.items())
        self.reasons.append(f"expected {colour} {requirement.name} == {requirement.count}, found {seen}")
        return False

    def _relation(
        self,
        requirement: Requirement,
        relation: str,
        targets: Sequence[Detection] | None,
        found: Sequence[Detection],
    ) -> bool:
        if targets is None:
            self.terms.append(0.0)
            self.reasons.append(f"no target for {requirement.name} to be {relation}")
            return False
        for detection in found:
            for target in targets:
                seen = relations(detection.box, target.box, self.position_threshold)
                if relation not in seen:
                    self.terms.extend([0.0, 1.0] if self.published_bug else [0.0])
                    told = " and ".join(sorted(seen)) or "no relation"
                    self.reasons.append(f"expected {requirement.name} {relation} target, found {told}")
                    return False
        self.terms.append(1.0)
        return True
