"""Pictures for the documentation: score curves, and the queue's cost against the number of workers."""

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
    _plain(axes)
    figure.legend(frameon=False, loc="outside lower center", ncols=2 if len(curves) > 4 else len(curves))
    return _save(figure, file)


def draw_load(workers: Mapping[str, Mapping[str, Any]], target_s: float, file: Path) -> Path:
    """What `dgpo bench load` found, against the number of workers: groups/s, latencies of `issue`, fairness.

    Args:
        workers: as benchmarks/load.py returns them.
        target_s: of the 99th percentile.
    """
    counts, found = [int(count) for count in workers], list(workers.values())
    figure, (rate, latency, fair) = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
    rate.plot(counts, [one["groups_s"] for one in found], marker="o", color=COLOURS[0], label="brought")
    rate.plot(counts, [one["offered_s"] for one in found], color=COLOURS[5], linestyle=":", label="offered")
    rate.set(ylabel="groups/s", yscale="log")
    for name, style in (("issue_p50_s", "-"), ("issue_p99_s", "--")):
        milliseconds = [1e3 * one[name] for one in found]
        latency.plot(counts, milliseconds, marker="o", color=COLOURS[1], linestyle=style, label=name[6:9])
    latency.axhline(1e3 * target_s, color=COLOURS[5], linewidth=0.8, linestyle=":", label="aim for p99")
    latency.set(ylabel="issue, ms", yscale="log")
    fair.plot(counts, [one["jain"] for one in found], marker="o", color=COLOURS[2], label="Jain's index")
    fair.set(ylabel="fairness", ylim=(0, 1.05))
    for axes in (rate, latency, fair):
        axes.set(xlabel="workers", xscale="log")
        axes.set_xticks(counts, labels=map(str, counts))
        axes.minorticks_off()
        _plain(axes)
        axes.legend(frameon=False)
    return _save(figure, file)


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, file: Path) -> Path:
    plt.rcParams["svg.hashsalt"] = "dgpo"  # the same curves give the same file
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file
