"""Which curves the run page shows, and their points: thinned, within a range of steps.

Promises
- The same charts, names and colours as report.html (services/report/curves.py); what was never measured has
  no chart.
- A curve has at most MOST_POINTS points; numbers have six digits, which is more than a screen shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.metrics import Estimate, EvalRow
from services.report.curves import LEARNER, reward_tones
from services.ui.columns import Columns, Values, thinned

MOST_POINTS = 1500


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    column: str
    name: str
    tone: int = 0
    dashed: bool = False
    spread: str = ""
    """Column of the half width of a band around it."""


@dataclass(frozen=True)
class Chart:
    key: str
    """In addresses and in the page."""
    section: str
    """reward, flow or learner."""
    title: str
    curves: tuple[Curve, ...]
    note: str = ""
    floor: float | None = None
    """The lowest value that the axis must show."""
    whole: bool = False
    """Counts."""
    marked: bool = False
    """Few points, each worth a dot and an error bar."""


_FLOW = (
    Chart(
        "staleness",
        "flow",
        "Staleness of the groups, in updates",
        (Curve("staleness_mean", "mean"), Curve("staleness_max", "max", 1, dashed=True)),
        floor=0.0,
    ),
    Chart(
        "queue",
        "flow",
        "Groups waiting in the queue",
        (Curve("queue_depth", "groups"),),
        floor=0.0,
        whole=True,
    ),
    Chart("seconds", "flow", "Seconds an update", (Curve("seconds", "seconds"),), floor=0.0),
    Chart(
        "flat",
        "flow",
        "Groups without variance, of an update",
        (Curve("zero_variance_groups", "groups"),),
        floor=0.0,
        whole=True,
    ),
)
_HELD_OUT: dict[str, tuple[str, Callable[[EvalRow], Mapping[str, Estimate]]]] = {
    "heldout": ("Held-out score", lambda row: row.rewards),
    "exact": ("Held-out exact matches", lambda row: row.exact),
}


def charts_of(columns: Columns, evals: Sequence[EvalRow], held: set[str], *, curriculum: bool) -> list[Chart]:
    """The charts that there is something for."""
    told = [name.split(".", 1)[1].removesuffix(".mean") for name in columns.names if name.endswith(".mean")]
    tones = reward_tones([*told, *(name for row in evals for name in row.rewards)], held)
    named = [
        Curve(f"rewards.{name}.mean", name, tone, dashed=name in held)
        for name, tone in tones.items()
        if tone > 0 and name in told
    ]
    found = [
        Chart(
            "reward",
            "reward",
            "Reward of the training groups",
            (Curve("reward_mean", "total", spread="reward_std"), *named),
            note="band: mean standard deviation within a group" + ("; dashed: held out" if held else ""),
        )
    ]
    for key, (title, read) in _HELD_OUT.items():
        names = dict.fromkeys(name for row in evals for name in read(row))
        curves = tuple(
            Curve(name, name, tone, dashed=name in held, spread=name) for tone, name in enumerate(names)
        )
        if curves:
            found.append(Chart(key, "reward", title, curves, note="bars: one standard error", marked=True))
    if len(columns) == 0:
        return found
    found += _FLOW
    if curriculum:
        left_out = (Curve("prompts_left_out", "prompts"),)
        title = "Prompts left out by the curriculum, by an update"
        found.append(Chart("curriculum", "flow", title, left_out, floor=0.0, whole=True))
    for field, title, floor in LEARNER:
        values = columns.column(field)
        if np.isfinite(values).any() and (field != "kl" or np.nan_to_num(values).any()):
            found.append(Chart(field, "learner", title, (Curve(field, "last"),), floor=floor))
    return found


def curves_of(
    chart: Chart,
    columns: Columns,
    evals: Sequence[EvalRow],
    *,
    first: int | None = None,
    last: int | None = None,
    most: int = MOST_POINTS,
) -> dict[str, Any]:
    """The points of a chart, as the page draws them; steps from `first` to `last`, both included."""
    most = min(max(most, 4), MOST_POINTS)
    if chart.marked:
        rows = [row for row in evals if (first or 0) <= row.step <= (row.step if last is None else last)]
        steps = np.array([row.step for row in rows], dtype=np.float64)
        read = _HELD_OUT[chart.key][1]
        drawn = [
            _estimates(steps, [read(row).get(curve.name) for row in rows], most) for curve in chart.curves
        ]
    else:
        steps = columns.steps(first, last)
        drawn = []
        for curve in chart.curves:
            values = columns.column(curve.column, first, last)
            if len(values) < len(steps):
                values = np.full(len(steps), np.nan)
            drawn.append(_line(steps, values, most))
            if curve.spread:
                spread = columns.column(curve.spread, first, last)
                drawn[-1]["low"] = _line(steps, values - spread, most)
                drawn[-1]["high"] = _line(steps, values + spread, most)
    return {"key": chart.key, "rows": len(steps), "curves": drawn}


def _line(steps: Values, values: Values, most: int) -> dict[str, Any]:
    places = thinned(values, most)
    return {"x": steps[places].astype(int).tolist(), "y": _short(values[places])}


def _estimates(steps: Values, found: Sequence[Estimate | None], most: int) -> dict[str, Any]:
    means = np.array([np.nan if one is None or one.mean is None else one.mean for one in found], dtype=float)
    errors = np.array([0.0 if one is None or one.se is None else one.se for one in found], dtype=float)
    return {**_line(steps, means, most), "error": _short(errors[thinned(means, most)])}


def _short(values: Values) -> list[float]:
    size = np.abs(np.where(values == 0, 1.0, values)).clip(1e-300, 1e300)
    unit = 10.0 ** (np.floor(np.log10(size)) - 5)
    digits = np.round(values / unit)
    # Divided by a whole number where the unit is a fraction, so that 0.3 stays 0.3.
    rounded = np.where(unit < 1, digits / np.maximum(np.round(1 / unit), 1.0), digits * unit)
    return [float(value) for value in rounded]
