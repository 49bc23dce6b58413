"""Going on with a run under other settings: `dgpo train --resume RUN_DIR --set ...`.

Promises
- What the run has made so far stays valid: settings that its checkpoints, its queued groups or its scores
  depend on are refused, all at once and each with its former value. Everything else may change.
- config.yaml says what the run goes on with, so that the next resume, eval, export and report agree; the
  former one is kept beside it as `config.yaml.before-N`, N counting up.
"""

from __future__ import annotations

import shutil
from typing import Any

from learner.checkpoint import newest_checkpoint, newest_step
from services.config import Config
from services.config_file import ConfigError, dump_config
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

OF_A_MACHINE = ("device", "text_encoders", "condition_cache", "compile")
"""Keys of `model` that say where something is, or how fast: another machine may have it otherwise."""


def reconfigure(run: RunDirectory, config: Config) -> None:
    """Make `config` that of a run; call it while holding the run (`RunDirectory.locked`).

    Raises:
        ConfigError: it changes what must stay, or leaves nothing to do; nothing was written.
        CheckpointsUnusable: the run has checkpoints, and none can be gone on from; nothing was written.
    """
    _check_unfinished(run, config)
    former = run.config()
    if config == former:
        return
    before, after = fixed_settings(former), fixed_settings(config)
    changed = [
        f"  {path}: {after[path]!r}; the run has {was!r}"
        for path, was in before.items()
        if after[path] != was
    ]
    if changed:
        raise ConfigError(
            f"{run.root}: a run cannot go on with other values of these: leave them out, or start a new run\n"
            + "\n".join(changed)
        )
    number = 1 + len(list(run.root.glob(f"{run.config_file.name}.before-*")))
    shutil.copyfile(run.config_file, run.root / f"{run.config_file.name}.before-{number}")
    partial = run.root / f".{run.config_file.name}.partial"
    partial.write_text(dump_config(config))
    partial.replace(run.config_file)


def _check_unfinished(run: RunDirectory, config: Config) -> None:
    wanted = config.learner.max_steps
    ended = {row.step for row in read_metrics(run.root).evals if row.when == "after"}

    def refused(done: int) -> bool:
        return done > wanted or (done == wanted and done in ended)

    # The learner verifies what it goes on from; nobody else does before "nothing" is said of it.
    if refused(newest_step(run.root)) and refused(done := _verified_step(run)):
        raise ConfigError(
            f"{run.root}: nothing to do: {done} updates are done and learner.max_steps is {wanted}; to go "
            f"on, --set learner.max_steps=N with N above {done}"
        )


def _verified_step(run: RunDirectory) -> int:
    newest = newest_checkpoint(run.root)
    return newest.step if newest is not None else 0


def fixed_settings(config: Config) -> dict[str, Any]:
    """What a run keeps from its start to its end, by path in the YAML."""
    raw = config.model_dump(mode="json")
    return {
        # Names, prompts and noise follow from them.
        **_flat("run", raw["run"]),
        # The checkpoint's shapes and the base it belongs to; another machine may have another device.
        **_flat("model", {key: value for key, value in raw["model"].items() if key not in OF_A_MACHINE}),
        # What an ordinal means, and how the groups that still wait in the queue were made.
        **_flat("prompts", raw["prompts"]),
        **{
            f"rollout.{key}": raw["rollout"][key]
            for key in (
                *("group_size", "solver", "order", "noise_level", "steps", "shift", "guidance"),
                *("sigmas", "terminal"),
            )
        },
        **{
            f"rewards[].{key}": [reward[key] for reward in raw["rewards"]]
            for key in ("name", "heldout", "required")
        },
        "learner.optimizer": raw["learner"]["optimizer"],
        # Which references checkpoints hold.
        "objective.name": raw["objective"]["name"],
        "objective.reference_of": raw["objective"].get("reference_of"),
        "objective.reference": raw["objective"].get("reference"),
        "objective.clip_range is null": raw["objective"].get("clip_range") is None,
        "queue.max_staleness (objective.reference_of: rollout)": config.past_references,
        # Scores before and after are of the same prompts, noise and solver.
        **{f"eval.{key}": raw["eval"][key] for key in ("seed", "path", "solver")},
    }


def _flat(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, part in value.items() for name, leaf in _flat(f"{path}.{key}", part).items()}
