"""The table of a comparison: as JSON rows, on the screen, and as Markdown for docs/results.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.curves import Curve

LEVELS = (0.85, 0.90, 0.93)
"""Held-out scores to which time and images are told."""


def compare(curves: Mapping[str, Sequence[Curve]], against: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each entry.

    Args:
        curves: entry -> its runs, one a seed.
        against: entry -> the one that its ratios are told to.
    """
    return [_row(name, curves[name], curves[against[name]]) | {"against": against[name]} for name in curves]


def table(title: str, rows: Sequence[Mapping[str, Any]], seeds: int) -> Table:
    """For a screen of 80 columns."""
    told = f"{title}, seeds: {seeds}; to a score: seconds, and their ratio"
    found = Table(title=told, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("", overflow="fold", min_width=16)
    for heading in ("score", "exact", "divers.", "seconds", *(f"to {level:g}" for level in LEVELS)):
        found.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [_shown(row[name], 3, "\n") for name in ("final", "exact", "diversity")]
        cells.append(_shown(row["seconds"], 0, "\n"))
        for level in LEVELS:
            to = row[f"to_{level}"]
            parts = [_shown(to["seconds"], 0, "\n") if to["reached"] else "never"]
            parts += [f"{to['ratio_seconds']:.2f} x"] if to["ratio_seconds"] else []
            parts += [f"{to['reached']} of {seeds}"] if 0 < to["reached"] < seeds else []
            cells.append("\n".join(parts))
        found.add_row(row["name"], *cells)
    return found


def markdown(rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """The same for a page, with images; errors are standard errors over seeds."""
    headings = ["", "score", "exact", "diversity left", "seconds in all"]
    for level in LEVELS:
        headings += [f"seconds to {level:.2f}", f"images to {level:.2f}"]
    lines = [
        "| " + " | ".join(headings) + " |",
        "| " + " | ".join(["---"] + ["--:"] * (len(headings) - 1)) + " |",
    ]
    for row in rows:
        cells = [row["name"], *(_shown(row[name], 3) for name in ("final", "exact", "diversity"))]
        cells.append(_shown(row["seconds"], 0))
        for level in LEVELS:
            to = row[f"to_{level}"]
            missed = "" if to["reached"] == seeds else f", {to['reached']} of {seeds} seeds"
            for name in ("seconds", "images"):
                ratio = to[f"ratio_{name}"]
                shown = _shown(to[name], 0) if to["reached"] else "never"
                told = f" ({ratio:.2f}x)" if ratio and row["against"] != row["name"] else ""
                cells.append(shown + told + (missed if to["reached"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _row(name: str, mine: Sequence[Curve], first: Sequence[Curve]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "final": _mean([one.scores[-1] for one in mine]),
        "exact": _mean([one.exact[-1] for one in mine]),
        "diversity": _mean([one.diversity for one in mine]),
        "seconds": _mean([one.seconds[-1] for one in mine]),
        "images": _mean([float(one.images[-1]) for one in mine]),
    }
    for level in LEVELS:
        reached, reference = ([one.reached(level) for one in group] for group in (mine, first))
        row[f"to_{level}"] = {
            "reached": sum(point is not None for point in reached),
            "seconds": _mean([point[0] for point in reached if point]),
            "images": _mean([point[1] for point in reached if point]),
            "ratio_seconds": _ratio(reached, reference, 0),
            "ratio_images": _ratio(reached, reference, 1),
        }
    return row


def _ratio(mine: Sequence[Any], first: Sequence[Any], index: int) -> float | None:
    """Of the means, where every seed of both reached the level: else the slowest would drop out."""
    if not all(mine) or not all(first):
        return None
    return statistics.fmean(p[index] for p in mine) / statistics.fmean(p[index] for p in first)


def _mean(values: Sequence[float]) -> dict[str, float] | None:
    if not values or any(math.isnan(value) for value in values):
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "se": error}


def _shown(value: Mapping[str, float] | None, digits: int, between: str = " ") -> str:
    if value is None:
        return "-"
    error = "" if math.isnan(value["se"]) else f"{between}± {value['se']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"
