"""Training runs side by side: score against seconds and against images, over several seeds.

A comparison is a list of entries, each a recipe with overrides; every entry is trained with every seed by
`dgpo train` in a process of its own, one after another, entries in turns, so that a slow hour of the machine
hits all of them. Finished runs in the folder that were made with the same configuration are taken as they
are: what was interrupted goes on.

Held-out scores are of the EMA weights, all entries with the same solver, on the same words at the same
initial noise. Seconds count from the start of the learner's loop: loading is the same for all.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.comparisons import COMPARISONS, Entry
from services.config import Config
from services.config_file import load_config
from services.metrics import Estimate
from services.telemetry import read_metrics

RUN_DEADLINE_S = 3600.0
LEVELS = (0.85, 0.90, 0.93)
"""Held-out scores to which time and images are told."""


_EVALUATED = (
    "eval.every_steps=6",
    "eval.prompts=192",
    "eval.final_prompts=320",
    "eval.solver=dpmsolver++",
    "telemetry.tensorboard=false",
    "telemetry.samples_every=0",
)
_ALONE = "rewards.1.every=1000000"
"""The independent engine is for evaluations here: it takes no time from training."""


@dataclass(frozen=True)
class Curve:
    """One run: held-out score against seconds and images."""

    steps: list[int]
    seconds: list[float]
    images: list[int]
    scores: list[float]
    exact: list[float]
    diversity: float
    """What is left of the spread across prompts (colours, placement, glyph size), 1 is all; nan: not known."""

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


def run_comparison(
    name: str, *, seeds: int, runs: Path, screen: Console, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Train what is missing, and compare.

    Args:
        name: of COMPARISONS.
        seeds: runs of each entry, with seeds from the comparison's first on.
        runs: folder of the runs; plots and the table go there too.
        overrides: for every entry.

    Raises:
        RuntimeError: a run failed; its log is named.
    """
    comparison = COMPARISONS[name]
    overrides = (*comparison.overrides, *overrides)
    curves: dict[str, list[Curve]] = {entry.name: [] for entry in comparison.entries}
    for seed in range(comparison.first_seed, comparison.first_seed + seeds):
        for entry in comparison.entries:
            place = runs / name / re.sub(r"[^\w.=-]+", "-", entry.name) / f"seed-{seed}"
            curves[entry.name].append(_trained(entry, seed, place, overrides, screen))
    result = {"benchmark": name, "seeds": seeds, "entries": [_row(entry, curves) for entry in curves]}
    screen.print(_table(result))
    from benchmarks.plots import draw

    for against in ("seconds", "images"):
        result[f"plot_{against}"] = str(draw(curves, against, runs / name / f"{name}-{against}.svg"))
    return result


def _trained(entry: Entry, seed: int, place: Path, overrides: Sequence[str], screen: Console) -> Curve:
    settings = [*_EVALUATED, _ALONE, *entry.overrides, *overrides, f"run.seed={seed}"]
    settings.append(f"run.directory={place.resolve()}")
    if entry.recorded:
        settings.append(f"prompts.path={(place / 'recording').resolve()}")
    config = load_config(entry.recipe, settings)  # refused before anything is spent
    if (run := _finished(place, config)) is None:
        place.mkdir(parents=True, exist_ok=True)
        screen.print(f"training {entry.name}, seed {seed}: {place}")
        log = place / "output.log"
        log.unlink(missing_ok=True)
        code = 0
        if entry.recorded and not (place / "recording").exists():
            code = _record(entry.recorded, [*overrides, f"run.seed={seed}"], place, log)
        if not code:
            code = _run(["services.train", "--config", entry.recipe, *_given(settings)], log)
        run = _finished(place, config)
        if code or run is None:
            raise RuntimeError(f"{entry.name}, seed {seed}: exit code {code}; see {log}")
    return curve(run)


def _record(groups: int, overrides: Sequence[str], place: Path, log: Path) -> int:
    partial = place / "recording.partial"
    shutil.rmtree(partial, ignore_errors=True)
    counted = ["--groups", str(groups), "--out", str(partial)]
    code = _run(["services.cli", "record", "quickstart", *counted, *_given(overrides)], log)
    if not code:
        partial.rename(place / "recording")
    return code


def _given(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _run(module: Sequence[str], log: Path) -> int:
    """Exit code of a module of ours."""
    with log.open("a") as output:
        return subprocess.run(
            [sys.executable, "-m", *module], stdout=output, stderr=output, timeout=RUN_DEADLINE_S, check=False
        ).returncode


def _finished(place: Path, config: Config) -> Path | None:
    """The newest finished run in a folder that was made with this very configuration."""
    for file in sorted(place.glob("*/config.yaml"), reverse=True):
        run = file.parent
        if read_metrics(run).evaluation("after") is not None and _same(load_config(file), config):
            return run
    return None


def _same(one: Config, other: Config) -> bool:
    """But for where the run lies: folders may be moved."""
    run = other.run.model_copy(update={"directory": one.run.directory})
    return one == other.model_copy(update={"run": run})


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


def _kept(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    kept = [after[name] / before[name] for name in after if name.endswith("_across") and before.get(name)]
    return statistics.fmean(kept) if kept else math.nan


def _known(value: Estimate | None) -> float:
    return math.nan if value is None or value.mean is None else value.mean


def _row(name: str, curves: dict[str, list[Curve]]) -> dict[str, Any]:
    mine, first = curves[name], next(iter(curves.values()))
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
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "se": error}


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['benchmark']}, seeds: {result['seeds']}", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in (
        "final score",
        "exact",
        "diversity",
        "seconds",
        *(f"s to {level:g} (ratio)" for level in LEVELS),
    ):
        table.add_column(heading, justify="right")
    for row in result["entries"]:
        cells = [_shown(row[name], 3) for name in ("final", "exact", "diversity")]
        cells.append(_shown(row["seconds"], 0))
        for level in LEVELS:
            to, ratio = row[f"to_{level}"], row[f"to_{level}"]["ratio_seconds"]
            missed = "" if to["reached"] == result["seeds"] else f" [{to['reached']}/{result['seeds']}]"
            cells.append(_shown(to["seconds"], 0) + (f" ({ratio:.2f})" if ratio else "") + missed)
        table.add_row(row["name"], *cells)
    return table


def _shown(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return "-"
    error = "" if math.isnan(value["se"]) else f" ± {value['se']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"
