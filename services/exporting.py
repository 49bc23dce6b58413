"""`dgpo export`: the newest checkpoint of a run as stock diffusers files.

Promises
- A pipeline directory that `from_pretrained` loads; of a LoRA run also a directory that `load_lora_weights`
  loads, as their model cards show (policy/export.py). No code of ours is needed to use them.
- Nothing of the user's is overwritten: an existing target is refused. Only the run's own `export/` follows
  the run; the former one stays until the new one is whole.
- Scores on a model card are those of the exported weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from services.config_file import ConfigError
from services.run_directory import RunDirectory


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
    from services.model_card import training_of

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
        training = training_of(run, config, checkpoint, weights)
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
