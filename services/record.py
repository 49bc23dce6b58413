"""`dgpo record`: sample and score groups with the untrained model, write them down, train nothing.

Promises
- The same queue, workers, reward servers and supervision as in training, with a learner that records groups
  in place of updates; an interrupted one leaves what it has as a recording.
- A recording is a pure function of recipe and seed: ordinals, prompts and seeds are those of a training run.
- `--out` is never written over. Logs and metrics are in a run directory, as of any run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from services.config import Config
from services.config_file import ConfigError, parse_config
from services.preflight import refuse_unusable
from services.run_directory import RunDirectory


def recorder_config(config: Config, groups: int) -> Config:
    """The configuration of the run that records.

    Raises:
        ConfigError: the groups of the recipe come from a recording themselves, or follow a curriculum.
    """
    if config.offline:
        raise ConfigError(
            f"prompts.source: {config.prompts.path} is a recording already; give prompts to sample for: "
            "words or file"
        )
    if config.prompts.curriculum.after:
        raise ConfigError(
            "prompts.curriculum: it follows what a model learns, and that of a recording learns nothing: "
            "--set prompts.curriculum.after=0"
        )
    per_step = _per_step(groups, config.learner.groups_per_step)
    # All versions are the same weights, so staleness costs nothing: keep every worker busy, one group being
    # sampled and one being scored.
    ahead = math.ceil(2 * config.rollout.workers / per_step)
    staleness = max(config.queue.max_staleness, 0 if config.cluster.colocate else ahead)
    raw = config.model_dump(mode="json")
    raw["run"]["name"] = f"{config.run.name[:57]}-record"
    raw["learner"] |= {"groups_per_step": per_step, "max_steps": groups // per_step}
    raw["learner"] |= {"ranks": 1, "sharding": "none", "placement": "pack"}
    raw["queue"] |= {
        "max_staleness": staleness,
        "max_groups": max(config.queue.max_groups, per_step * (staleness + 1)),
    }
    raw["checkpoint"]["every_steps"] = 1
    raw["telemetry"]["record"] = False
    return parse_config(raw, source=f"the recording of {config.run.name}")


def record_groups(config: Config, groups: int, out: Path, screen: Console) -> dict[str, Any]:
    """Record.

    Args:
        config: of the recipe.
        groups: to record.
        out: directory to make.
        screen: where people look.

    Returns:
        Where the recording is, what is in it, and how long it took.

    Raises:
        ConfigError: `out` exists, or the configuration cannot be recorded.
        PartFailed: a part kept failing; what is recorded so far stays readable.
    """
    own = recorder_config(config, groups)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not an empty directory; give a new one")
    with screen.status("checking the recipe"):
        refuse_unusable(own)
    with screen.status("loading"):
        from services.driver import train
        from services.progress import Progress
        from services.recording import read_index
        from services.telemetry import read_metrics

    directory = RunDirectory.create(own)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    heldout = [reward.name for reward in own.rewards if reward.heldout]
    with Progress(directory.name, own.learner.max_steps, heldout=heldout, console=screen) as progress:
        outcome = train(own, directory, progress, record=out)
    _, recorded = read_index(out)
    rows = read_metrics(directory.root).updates
    means = [row.reward_mean for row in rows if row.reward_mean is not None]
    size = sum({group.shard: group.shard_bytes for group in recorded}.values())
    screen.print(
        f"recorded {len(recorded)} groups ({size / 1024**2:.1f} MiB) in {out}; train from them with\n"
        f"  --set prompts.source=recorded --set prompts.path={out}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return {
        "recording": str(out),
        "run_dir": str(directory.root),
        "interrupted": outcome.interrupted,
        "groups": len(recorded),
        "images": len(recorded) * own.rollout.group_size,
        "bytes": size,
        "reward_mean": sum(means) / len(means) if means else None,
        "seconds": round(outcome.seconds, 1),
    }


def _per_step(groups: int, at_most: int) -> int:
    """The largest number up to `at_most` that divides `groups`: a step is recorded whole, as one shard."""
    return max(size for size in range(1, min(groups, at_most) + 1) if groups % size == 0)
