"""Score curves as a picture for docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

STYLES = ("-", "--", ":")
"""By turns, where there are more entries than colours."""
COLOURS = ("#1f6feb", "#d1571f", "#2b8a3e", "#8250df", "#9a6700", "#57606a")


def draw(curves: Mapping[str, Sequence[Any]], against: str, file: Path) -> Path:
    """Held-out score against `seconds` or `images`: a thin line a run, a thick one the mean over seeds.

    The mean is drawn where every seed has been evaluated, which is at the same updates.
    """
    plt.rcParams["svg.hashsalt"] = "dgpo"  # the same curves give the same file
    figure, axes = plt.subplots(figsize=(7.5, 4.4 + 0.12 * len(curves)), layout="constrained")
    for number, (name, runs) in enumerate(curves.items()):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        for run in runs:
            axes.plot(
                getattr(run, against), run.scores, color=colour, linestyle=style, alpha=0.3, linewidth=0.8
            )
        count = min(len(run.scores) for run in runs)
        x = [sum(getattr(run, against)[k] for run in runs) / len(runs) for k in range(count)]
        y = [sum(run.scores[k] for run in runs) / len(runs) for k in range(count)]
        axes.plot(x, y, color=colour, linestyle=style, linewidth=2, label=name)
    axes.set_xlabel("seconds" if against == "seconds" else "images generated")
    axes.set_ylabel("held-out score")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2 if len(curves) > 4 else len(curves))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file
