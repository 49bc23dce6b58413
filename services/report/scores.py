"""Before and after: held-out scores, exact matches and diversity, each with what is known of its error.

Promises
- A change has the standard error of the paired differences where the same prompts were scored before and
  after, else of two independent means; what was not measured is None and said to be so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.config import Config
from services.metrics import Estimate, EvalRow
from services.report.samples import EvalSample

_BETWEEN = {"across": "between prompts", "within": "within a group"}


@dataclass(frozen=True)
class Change:
    """One measure before and after."""

    name: str
    before: Estimate | None
    after: Estimate | None
    difference: float | None
    error: float | None
    """Standard error of the difference."""


@dataclass(frozen=True)
class Engine:
    """One reward and what it says of held-out images."""

    name: str
    heldout: bool
    changes: tuple[Change, ...]


def engines(
    config: Config | None,
    before: EvalRow | None,
    after: EvalRow | None,
    samples: tuple[Sequence[EvalSample], Sequence[EvalSample]],
) -> tuple[Engine, ...]:
    """Score and exact-match rate of every reward, trained ones first.

    Args:
        after: the newest evaluation; the caller says whether training had ended.
        samples: what was scored before and after, prompt by prompt; for the paired errors.
    """
    heldout = {reward.name for reward in config.rewards if reward.heldout} if config else set()
    rows = [row for row in (before, after) if row is not None]
    names = list(dict.fromkeys(name for row in rows for name in row.rewards))
    names.sort(key=lambda name: name in heldout)
    paired = after is not None and after.when == "after"
    pairs = _pairs(*samples) if paired else []
    return tuple(
        Engine(
            name,
            name in heldout,
            tuple(
                change
                for change in (
                    _change("score", before, after, pairs, _score(name), "rewards", name),
                    _change("exact", before, after, pairs, _exact(name), "exact", name),
                )
                if change.before or change.after
            ),
        )
        for name in names
    )


@dataclass(frozen=True)
class Diversity:
    """How much images differ: rows are what differs, columns are between what."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[float | None, float | None], ...]], ...]
    """(name, (before, after) of each column)."""


def diversity(before: EvalRow | None, after: EvalRow | None) -> Diversity | None:
    """Every measure that either evaluation has; a name ends in `_across` prompts or `_within` a group."""
    was = before.diversity if before else {}
    now = after.diversity if after else {}
    found: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for name in {**was, **now}:
        thing, _, kind = name.rpartition("_")
        label = _BETWEEN.get(kind)
        thing, label = (thing, label) if label else (name, "all images")
        found.setdefault(thing.replace("_", " "), {})[label] = (was.get(name), now.get(name))
    columns = tuple(dict.fromkeys(label for measures in found.values() for label in measures))
    rows = tuple(
        (thing, tuple(measures.get(label, (None, None)) for label in columns))
        for thing, measures in found.items()
    )
    return Diversity(columns, rows) if rows else None


def _change(
    label: str,
    before: EvalRow | None,
    after: EvalRow | None,
    pairs: Sequence[tuple[EvalSample, EvalSample]],
    read: Callable[[EvalSample], float | None],
    field: str,
    name: str,
) -> Change:
    was: Estimate | None = getattr(before, field).get(name) if before else None
    now: Estimate | None = getattr(after, field).get(name) if after else None
    if was is None or now is None or was.mean is None or now.mean is None:
        return Change(label, was, now, None, None)
    differences = [
        b - a for a, b in ((read(x), read(y)) for x, y in pairs) if a is not None and b is not None
    ]
    error = _standard_error(differences) if len(differences) == len(pairs) else None
    if error is None and was.se is not None and now.se is not None:
        error = math.hypot(was.se, now.se)
    return Change(label, was, now, now.mean - was.mean, error)


def _pairs(before: Sequence[EvalSample], after: Sequence[EvalSample]) -> list[tuple[EvalSample, EvalSample]]:
    if [sample.prompt for sample in before] != [sample.prompt for sample in after]:
        return []
    return list(zip(before, after, strict=True))


def _score(name: str) -> Callable[[EvalSample], float | None]:
    return lambda sample: sample.scores.get(name)


def _exact(name: str) -> Callable[[EvalSample], float | None]:
    def read(sample: EvalSample) -> float | None:
        value = sample.details.get(name, {}).get("exact")
        return float(value) if isinstance(value, bool | int | float) else None

    return read


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
