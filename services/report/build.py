"""report.html: one file that tells what a run did, opens offline, and can be mailed.

Promises
- Everything is inside the file; it loads nothing and runs nothing, and its content policy tells browsers so.
- What comes from prompts, scorers and errors is escaped: the template escapes by default.
- Missing pieces (no evaluation yet, an interrupted run, torn files) are named in the page; only a directory
  that is not a run is an error.
- Written whole or not at all, through a rename. Nothing of `secrets/` is read; credentials in addresses
  are blanked.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from services.config import Config
from services.config_file import ConfigError, load_config
from services.formatting import duration, number, size
from services.metrics import UpdateRow
from services.report import curves, pictures, samples, scores
from services.telemetry import METRICS_FILE, Metrics, read_metrics

MAX_EVENTS = 200


@dataclass(frozen=True)
class Status:
    """How far the run has come, in words."""

    state: str
    """done, unfinished or empty."""
    text: str


def build_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Raises:
        FileNotFoundError: the directory holds neither a configuration nor metrics: it is not a run.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).is_file() for name in ("config.yaml", METRICS_FILE)):
        raise FileNotFoundError(
            f"{run_dir}: not a run directory: there is neither config.yaml nor {METRICS_FILE}"
        )
    page = _environment().get_template("report.html.j2").render(**_contents(run_dir))
    unfinished = run_dir / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, run_dir / "report.html")  # noqa: PTH105 - the promise of a rename, spelt out
    return run_dir / "report.html"


def _contents(run_dir: Path) -> dict[str, Any]:
    config, config_text, config_error = _config(run_dir)
    metrics = read_metrics(run_dir)
    before, after = metrics.evaluation("before"), metrics.evaluation("after")
    newest = metrics.newest_evaluation
    heldout = [reward.name for reward in config.rewards if reward.heldout] if config else []
    told = samples.load_eval(run_dir, "before"), samples.load_eval(run_dir, "after")
    return {
        "css": Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
        "name": run_dir.resolve().name,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "config": config,
        "config_text": config_text,
        "config_error": config_error,
        "tiny": config is not None and config.model.width <= 128,
        "status": _status(metrics),
        "facts": _facts(metrics),
        "before": before,
        "after": after,
        "newest": newest,
        "engines": scores.engines(config, before, newest, told),
        "diversity": scores.diversity(before, after),
        "reward_charts": curves.reward_charts(metrics, heldout),
        "flow_charts": curves.flow_charts(
            metrics.updates, curriculum=config is not None and config.prompts.curriculum.after > 0
        ),
        "learner_charts": curves.learner_charts(metrics.updates),
        "times": curves.time_breakdowns(metrics.updates),
        "pairs": pictures.pairs(run_dir, config, after=after is not None),
        "groups": pictures.shown_groups(run_dir, config),
        "events": metrics.events[-MAX_EVENTS:],
        "events_left_out": max(0, len(metrics.events) - MAX_EVENTS),
        "started": metrics.updates[0].time - metrics.updates[0].seconds if metrics.updates else None,
        "memory": sorted(metrics.memory.parts.items(), key=lambda part: -part[1]) if metrics.memory else [],
        "unreadable": metrics.unreadable,
        "environment": _facts_of_environment(run_dir),
    }


def _status(metrics: Metrics) -> Status:
    if not metrics.updates:
        return Status("empty", "No update has been recorded yet.")
    last = metrics.updates[-1]
    trained = f"{last.step} of {last.max_steps} updates"
    if last.step < last.max_steps:
        return Status("unfinished", f"Unfinished: {trained}. The run was interrupted, or is still going on.")
    if metrics.evaluation("after") is None:
        return Status("unfinished", f"Trained {trained}; not evaluated after training.")
    return Status("done", f"Done: {trained}.")


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    if not metrics.updates:
        return []
    rows: tuple[UpdateRow, ...] = metrics.updates
    last, trained = rows[-1], sum(row.seconds for row in rows)
    flat = sum(row.zero_variance_groups for row in rows)
    facts = [
        ("updates", f"{last.step:,}"),
        ("groups", f"{last.groups:,}"),
        ("images", f"{last.images:,}"),
        ("training time", duration(trained)),
        ("images / s", number(last.images / trained if trained else None, 1)),
        ("max staleness", str(max(row.staleness_max for row in rows))),
        ("groups without variance", f"{flat / last.groups:.1%}" if last.groups else "-"),
    ]
    dropped = Counter[str]()
    for row in rows:
        dropped.update(row.dropped_terms)
    facts += [(f"groups without {name}", f"{count / last.groups:.1%}") for name, count in dropped.items()]
    dead = sum(event.what == "dead letter" for event in metrics.events)
    restarts = sum("restart" in event.what for event in metrics.events)
    facts += [("dead letters", str(dead))] if dead else []
    facts += [("restarts", str(restarts))] if restarts else []
    facts += [("resumed", f"{last.epoch} x")] if last.epoch else []
    return facts


def _config(run_dir: Path) -> tuple[Config | None, str, str]:
    path = run_dir / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return None, "", f"config.yaml cannot be read: {error}"
    try:
        return load_config(path), without_credentials(text), ""
    except ConfigError as error:
        return None, without_credentials(text), without_credentials(str(error))


def without_credentials(text: str) -> str:
    return re.sub(r"(://)[^/@\s]*@", r"\1***@", text)


def _facts_of_environment(run_dir: Path) -> list[tuple[str, str]]:
    try:
        told = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(told, dict):
        return []
    packages = told.pop("packages", None)
    flat = {**told, **packages} if isinstance(packages, dict) else told
    return [(str(name), "-" if value is None else str(value)) for name, value in flat.items()]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("services.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "size": size,
        "signed": lambda value, digits=3: "-" if value is None else f"{value:+.{digits}f}".replace("-", "−"),
        "estimate": lambda estimate: number(estimate.mean if estimate else None),
    }
    environment.globals["clock"] = _clock
    return environment


def _clock(time: float, started: float | None) -> str:
    """Time into training, or the time of day where training never began."""
    if started is None:
        return datetime.fromtimestamp(time, UTC).strftime("%H:%M:%S")
    return ("-" if time < started else "") + duration(abs(time - started))
