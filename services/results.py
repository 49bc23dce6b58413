"""The result of a run in one flat object: what `--json` prints and the closing table shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from services.config import Config
from services.formatting import estimate
from services.metrics import EvalRow, UpdateRow
from services.monitor import Outcome
from services.telemetry import read_metrics


def summary(config: Config, outcome: Outcome) -> dict[str, Any]:
    """Scores before and after with standard errors, counts and the digest of the final weights.

    `score_*` and `exact_*` are of the first trained reward; `independent_*` of the first held-out one, where
    there is one. A number that was not measured is null.
    """
    metrics = read_metrics(outcome.run.root)
    trained = config.trained_rewards[0].name
    heldout = next((reward.name for reward in config.rewards if reward.heldout), None)
    result: dict[str, Any] = {
        "run_dir": str(outcome.run.root),
        "interrupted": outcome.interrupted,
        "guard": outcome.guard,
    }
    for when in ("before", "after"):
        row = metrics.evaluation(when)
        result |= _scores(row, trained, when, "")
        if heldout is not None:
            result |= _scores(row, heldout, when, "independent_")
    updates = metrics.updates
    return result | {
        "heldout_prompts": next((row.prompts for row in metrics.evals if row.when != "during"), None),
        "seconds": round(outcome.seconds, 1),
        "steps": outcome.version.step,
        "epoch": outcome.version.epoch,
        "groups": updates[-1].groups if updates else 0,
        "images": updates[-1].images if updates else 0,
        "overhead_fraction": _overhead(config, updates),
        "max_staleness_seen": max((row.staleness_max for row in updates), default=0),
        "weights_digest": outcome.weights_digest,
        "diversity_before": getattr(metrics.evaluation("before"), "diversity", None) or None,
        "diversity_after": getattr(metrics.evaluation("after"), "diversity", None) or None,
        "peak_memory_bytes": metrics.memory.parts if metrics.memory else None,
    }


def _overhead(config: Config, updates: Sequence[UpdateRow]) -> float | None:
    """Share of an update's wall time that is not model code: the larger of learner's and a worker's.

    Learner: codec, publish and commit. A worker: leases, installs, codec and admits of its groups.
    """
    rows = updates[1:]
    seconds = sum(row.seconds for row in rows)
    if not seconds:
        return None
    learner = sum(row.phases.get(name, 0.0) for row in rows for name in ("codec_s", "publish_s", "commit_s"))
    share = config.learner.groups_per_step / (1 if config.offline else config.rollout.workers)
    worker = sum(row.rollout.get("overhead_s", 0.0) * share for row in rows)
    return round(max(learner, worker) / seconds, 4)


def _scores(row: EvalRow | None, reward: str, when: str, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, estimates in (
        ("score", row.rewards if row else {}),
        ("exact", row.exact if row else {}),
    ):
        estimate = estimates.get(reward)
        found[f"{prefix}{kind}_{when}"] = estimate.mean if estimate else None
        found[f"{prefix}{kind}_{when}_se"] = estimate.se if estimate else None
    return found


def closing_table(config: Config, result: dict[str, Any]) -> Table:
    """Scores before and after for people, each with its standard error."""
    table = Table(
        title=f"held-out prompts: {result['heldout_prompts'] or 'none scored'}", title_justify="left"
    )
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    names = {"": config.trained_rewards[0].name}
    heldout = [reward.name for reward in config.rewards if reward.heldout]
    if heldout:
        names["independent_"] = heldout[0]
    for prefix, name in names.items():
        for kind in ("score", "exact"):
            cells = [_cell(result, f"{prefix}{kind}_{when}") for when in ("before", "after")]
            if any(cells):
                table.add_row(f"{name} {kind}", *(cell or "-" for cell in cells))
    return table


def _cell(result: dict[str, Any], key: str) -> str:
    mean, error = result.get(key), result.get(f"{key}_se")
    if mean is None:
        return ""
    return estimate(mean, error)
