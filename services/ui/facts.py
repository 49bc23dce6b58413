"""How far a run has come, in numbers for the head of the page.

Promises
- From columns alone: counting costs a few passes over arrays, no row is read again.
"""

from __future__ import annotations

from typing import Any

from services.config import Config
from services.formatting import duration, number
from services.ui.tail import MetricsTail


def facts_of(tail: MetricsTail, config: Config | None) -> dict[str, Any]:
    """Step, steps in all, seconds that the rest takes at the pace of the newest updates, and named facts."""
    with tail.columns() as columns:
        step, count = columns.last_step, len(columns)
        seconds, stalest = columns.column("seconds"), columns.column("staleness_max")
        groups, images = columns.column("groups"), columns.column("images")
        flat = columns.column("zero_variance_groups")
    recent = tail.recent()
    if not count or not recent:
        return {"step": 0, "max_steps": config.learner.max_steps if config else None, "facts": []}
    most, trained = recent[-1].max_steps, float(seconds.sum())
    return {
        "step": step,
        "max_steps": most,
        "eta_s": sum(row.seconds for row in recent) / len(recent) * max(0, most - step),
        "updated": recent[-1].time,
        "facts": [
            ("updates", f"{step:,}"),
            ("groups", f"{groups[-1]:,.0f}"),
            ("images", f"{images[-1]:,.0f}"),
            ("training time", duration(trained)),
            ("images / s", number(float(images[-1]) / trained if trained else None, 1)),
            ("max staleness", f"{stalest.max():.0f}"),
            ("groups without variance", f"{flat.sum() / groups[-1]:.1%}" if groups[-1] else "-"),
        ],
    }
