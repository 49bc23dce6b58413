"""Training runs side by side: score against seconds and against images, over several seeds.

A comparison is a list of entries, each a recipe with overrides; every entry is trained with every seed by
`dgpo train` in a process of its own, one after another, entries in turns, so that a slow hour of the machine
hits all of them. Finished runs in the folder that were made with the same configuration are taken as they
are: what was interrupted goes on.

Held-out scores are of the EMA weights, all entries with the same solver, on the same words at the same
initial noise. Seconds count from the start of the learner's loop: loading is the same for all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.comparison_table import compare, markdown, table
from benchmarks.comparisons import COMPARISONS, BaseModel, Entry
from benchmarks.curves import Curve, curve
from services.config import Config
from services.config_file import find, load_config
from services.telemetry import read_metrics

RUN_DEADLINE_S = 3600.0
PRETRAINING_DEADLINE_S = 3 * 3600.0
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
    first = comparison.entries[0].name
    rows = compare(curves, {entry.name: entry.against or first for entry in comparison.entries})
    screen.print(table(name, rows, seeds))
    (page := runs / name / f"{name}.md").write_text(markdown(rows, seeds))
    result = {"benchmark": name, "seeds": seeds, "entries": rows, "page": str(page)}
    from benchmarks.plots import draw

    for axis in ("seconds", "images"):
        result[f"plot_{axis}"] = str(draw(curves, axis, runs / name / f"{name}-{axis}.svg"))
    return result


def _trained(entry: Entry, seed: int, place: Path, overrides: Sequence[str], screen: Console) -> Curve:
    settings = [*_EVALUATED, _ALONE, *entry.overrides, *overrides, f"run.seed={seed}"]
    settings.append(f"run.directory={place.resolve()}")
    if entry.base is not None:
        settings.append(f"model.path={_pretrained(entry.base, place.parents[1], screen).resolve()}")
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


def _pretrained(base: BaseModel, runs: Path, screen: Console) -> Path:
    """The base model, made once for a folder of runs, with the quickstart's autoencoder."""
    made = runs / "models" / f"layers={base.layers}-heads={base.heads}-steps={base.steps}"
    if not made.exists():
        partial = made.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        screen.print(f"pretraining {made}")
        words = ["--out", str(partial), "--vae", str(find("quickstart/model")), "--steps", str(base.steps)]
        words += ["--layers", str(base.layers), "--heads", str(base.heads)]
        log = partial.with_suffix(".log")
        if code := _run(["quickstart.pretrain", *words], log, PRETRAINING_DEADLINE_S):
            raise RuntimeError(f"pretraining {made}: exit code {code}; see {log}")
        partial.rename(made)
    return made


def _given(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _run(module: Sequence[str], log: Path, deadline_s: float = RUN_DEADLINE_S) -> int:
    """Exit code of a module of ours."""
    with log.open("a") as output:
        return subprocess.run(
            [sys.executable, "-m", *module], stdout=output, stderr=output, timeout=deadline_s, check=False
        ).returncode


def _finished(place: Path, config: Config) -> Path | None:
    """The newest finished run in a folder that was made with this very configuration."""
    for file in sorted(place.glob("*/config.yaml"), reverse=True):
        run = file.parent
        if read_metrics(run).evaluation("after") is not None and _unplaced(load_config(file)) == _unplaced(
            config
        ):
            return run
    return None


def _unplaced(config: Config) -> str:
    """A configuration but for where its run, recording and base model lie: folders may be moved."""
    place = Path(config.run.directory)
    run = config.run.model_copy(update={"directory": "."})
    text = config.model_copy(update={"run": run}).model_dump_json()
    # Of RUNS/NAME/ENTRY/SEED: recordings are in the last, base models in RUNS/NAME/models.
    for folder in (place, *place.parents[1:2]):
        text = text.replace(f'"{folder}/', '"')
    return text
