"""`dgpo export`: the newest checkpoint of a run as stock diffusers files.

Promises
- A pipeline directory that plain `from_pretrained` loads; of a LoRA run also a directory that plain
  `load_lora_weights` loads. No code and no argument of ours is needed to use them.
- Nothing is overwritten: an existing target is refused.
"""

from __future__ import annotations

from pathlib import Path

from services.config_file import ConfigError
from services.run_directory import RunDirectory
from services.telemetry import read_metrics


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

    run = RunDirectory.open(run_dir)
    config = run.config()
    if weights not in ("ema", "policy"):
        raise ConfigError(f"--weights {weights!r}: ema or policy")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: exists and is not empty; give a new directory")
    checkpoint = newest_checkpoint(run.root)
    if checkpoint is None:
        raise ConfigError(f"{run_dir}: the run has no complete checkpoint to export")
    # Here and not on the device of the run, which this machine may not have.
    model = config.model.model_copy(update={"device": "cpu"})
    policy = load_policy(model, text_encoders=True, vae=True, base=False, seed=config.run.seed)
    policy.install(checkpoint.state[weights])
    facts = {"run": run.name, "step": checkpoint.step, "weights": weights}
    after = read_metrics(run.root).evaluation("after")
    if after is not None:
        for name, score in after.rewards.items():
            facts[f"held-out {name}"] = f"{score.mean:.3f} ± {score.se:.3f} ({after.prompts} prompts)"
    return export_policy(policy, out, rollout=config.rollout, facts=facts)
