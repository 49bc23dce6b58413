"""What one training run did: held-out score against seconds and against images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.metrics import Estimate
from services.telemetry import read_metrics


@dataclass(frozen=True)
class Curve:
    """One run: held-out score against seconds and images."""

    steps: list[int]
    seconds: list[float]
    images: list[int]
    scores: list[float]
    exact: list[float]
    diversity: float
    """What is left of the spread across prompts (colours, placement, glyph size): 1 is all, nan unknown."""

    def reached(self, level: float) -> tuple[float, float] | None:
        """Seconds and images to a score, between two evaluations by the straight line; None: never."""
        for place in range(1, len(self.scores)):
            low, high = self.scores[place - 1], self.scores[place]
            if low < level <= high:
                part = (level - low) / (high - low)
                return (
                    self.seconds[place - 1] + part * (self.seconds[place] - self.seconds[place - 1]),
                    self.images[place - 1] + part * (self.images[place] - self.images[place - 1]),
                )
        return None


def curve(run: Path) -> Curve:
    """Read a run's held-out scores of its first trained reward."""
    metrics = read_metrics(run)
    first = metrics.updates[0]
    started = first.time - first.seconds
    at = {row.step: (row.time - started, row.images) for row in metrics.updates} | {0: (0.0, 0)}
    rows = sorted((row for row in metrics.evals if row.step in at), key=lambda row: row.step)
    reward = next(iter(rows[0].exact or rows[0].rewards))
    return Curve(
        steps=[row.step for row in rows],
        seconds=[at[row.step][0] for row in rows],
        images=[at[row.step][1] for row in rows],
        scores=[_known(row.rewards.get(reward)) for row in rows],
        exact=[_known(row.exact.get(reward)) for row in rows],
        diversity=_kept(rows[0].diversity, rows[-1].diversity),
    )


def _kept(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> float:
    across = [(before.get(name), value) for name, value in after.items() if name.endswith("_across")]
    kept = [value / first for first, value in across if first and value is not None]
    return statistics.fmean(kept) if kept else math.nan


def _known(value: Estimate | None) -> float:
    return math.nan if value is None or value.mean is None else value.mean
