"""`dgpo export`: the newest checkpoint of a run as stock diffusers files.

Promises
- A pipeline directory that plain `from_pretrained` loads; of a LoRA run also a directory that plain
  `load_lora_weights` loads. No code and no argument of ours is needed to use them.
- Nothing of the user's is overwritten: an existing target is refused. Only the run's own `export/` follows
  the run; the former one stays until the new one is whole.
- Scores on a model card are those of the exported weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from services.config import Config
from services.config_file import ConfigError
from services.formatting import estimate
from services.prompts import prompt_source
from services.run_directory import RunDirectory
from services.telemetry import read_metrics

if TYPE_CHECKING:
    from learner.checkpoint import Checkpoint


def export_run(run_dir: Path, out: Path, weights: str) -> list[Path]:
    """Export.

    Args:
        run_dir: a run directory.
        out: directory to make; `pipeline/` and, of a LoRA run, `lora/` are made in it.
        weights: `ema` or `policy`.

    Returns:
        What was written.

    Raises:
        ConfigError: no such run or checkpoint, unknown weights, or the target exists.
    """
    from learner.checkpoint import newest_checkpoint
    from policy import load_policy
    from policy.export import export_policy
    from policy.loading import quiet
    from policy.model_card import Training

    run = RunDirectory.open(run_dir)
    config = run.config()
    if weights not in ("ema", "policy"):
        raise ConfigError(f"--weights {weights!r}: ema or policy")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not an empty directory; give a new one")
    checkpoint = newest_checkpoint(run.root)
    if checkpoint is None:
        raise ConfigError(f"{run_dir}: the run has no complete checkpoint to export")
    # Here and not on the device of the run, which this machine may not have.
    model = config.model.model_copy(update={"device": "cpu"})
    # Libraries tell of parts that nobody asked for, and of files that are written.
    with quiet():
        policy = load_policy(model, text_encoders=True, vae=True, base=False, seed=config.run.seed)
        policy.install(checkpoint.state[weights])
        training = Training(
            objective=type(config.objective),
            name=run.name,
            prompt=_example(config) or Training.prompt,
            facts=_facts(run, checkpoint, weights),
        )
        return export_policy(policy, out, rollout=config.evaluation_rollout, training=training)


def export_into(run: RunDirectory) -> Path:
    """Export the EMA weights of a run into its own `export/`, in place of an earlier export.

    Returns:
        The directory.

    Raises:
        ConfigError: the run has no checkpoint.
    """
    final, partial, former = (run.root / name for name in ("export", ".export.partial", ".export.former"))
    shutil.rmtree(partial, ignore_errors=True)
    export_run(run.root, partial, "ema")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    partial.rename(final)
    shutil.rmtree(former, ignore_errors=True)
    return final


def _example(config: Config) -> str | None:
    """A held-out prompt of the run, if it has any that can still be read."""
    try:
        found = prompt_source(config).heldout(config.run.seed, 1)
    except ConfigError:
        return None
    return found[0].text if found else None


def _facts(run: RunDirectory, checkpoint: Checkpoint, weights: str) -> dict[str, object]:
    facts: dict[str, object] = {"run": run.name, "step": checkpoint.step, "weights": weights}
    # Evaluations inside a run are of the EMA, each of one step.
    rows = [row for row in read_metrics(run.root).evals if row.step == checkpoint.step]
    if weights == "ema" and rows:
        for name, score in rows[-1].rewards.items():
            facts[f"held-out {name}"] = f"{estimate(score.mean, score.se)} ({rows[-1].prompts} prompts)"
    return facts
