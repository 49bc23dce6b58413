"""`dgpo export`: the newest checkpoint of a run as stock diffusers files.

Promises
- A pipeline directory that `from_pretrained` loads; of a LoRA run also a directory that `load_lora_weights`
  loads, as their model cards show (policy/export.py). No code of ours is needed to use them.
- Nothing of the user's is overwritten: a target that has anything in it is refused, but for the other part
  where one is written alone. Only the run's own `export/` follows the run; the former one stays until the new
  one is whole.
- What has its name is whole: files are written into `.partial` inside the target first (`.partial-lora`, of
  that part alone). An export that fails leaves nothing behind, and one that was killed is no obstacle to the
  next.
- Scores on a model card are those of the exported weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from services.config_file import ConfigError
from services.full_disk import disk_refuses
from services.run_directory import RunDirectory

if TYPE_CHECKING:
    from policy.export import Exported

PARTIAL = ".partial"


class ExportError(RuntimeError):
    """The files could not be written; nothing was left behind."""


def export_run(run_dir: Path, out: Path, weights: str, only: Exported | None = None) -> list[Path]:
    """Export.

    Args:
        run_dir: a run directory.
        out: directory to make; `pipeline/` and, of a LoRA run, `lora/` are made in it.
        weights: `ema` or `policy`.
        only: one of the two; the other may be in `out` already. A LoRA alone is small, and needs neither
            text encoders nor VAE.

    Returns:
        What was written.

    Raises:
        ConfigError: no such run or checkpoint, unknown weights, no such part, or something is in the target.
        ExportError: the disk took no more.
    """
    from learner.checkpoint import newest_checkpoint
    from policy import load_policy
    from policy.export import export_policy
    from policy.loading import quiet
    from services.training_facts import training_of

    run = RunDirectory.open(run_dir)
    config = run.config()
    if weights not in ("ema", "policy"):
        raise ConfigError(f"--weights {weights!r}: ema or policy")
    if only == "lora" and config.model.train != "lora":
        raise ConfigError("--only lora: the run has trained every weight (model.train full); leave it out")
    _check_target(out, only)
    checkpoint = newest_checkpoint(run.root)
    if checkpoint is None:
        raise ConfigError(f"{run_dir}: the run has no complete checkpoint to export")
    # Here and not on the device of the run, which this machine may not have.
    model = config.model.model_copy(update={"device": "cpu"})
    whole = only != "lora"
    # Libraries tell of parts that nobody asked for, and of files that are written.
    with quiet(), _written(out, only) as partial:
        policy = load_policy(model, text_encoders=whole, vae=whole, base=False, seed=config.run.seed)
        policy.install(checkpoint.state[weights])
        made = export_policy(
            policy,
            partial,
            rollout=config.evaluation_rollout,
            training=training_of(run, config, checkpoint, weights),
            only=only,
        )
    return [out / path.name for path in made]


def _check_target(out: Path, only: Exported | None) -> None:
    """Whether nothing is in the way; beside a part that is written alone the other one is not.

    Raises:
        ConfigError: something is.
    """
    if not out.exists():
        return
    other = {"lora": "pipeline", "pipeline": "lora"}[only] if only else None
    in_the_way = [one for one in out.iterdir() if one.name != other] if out.is_dir() else [out]
    if not all(one.name.startswith(PARTIAL) for one in in_the_way):
        beside = f" (--only {only}: or one with nothing but {other}/ in it)" if other else ""
        raise ConfigError(f"--out {out}: exists and is not an empty directory; give a new one{beside}")


@contextmanager
def _written(out: Path, only: Exported | None) -> Iterator[Path]:
    """A directory to write into; what is in it at the end goes to `out`.

    Inside of `out`, which may be a file system of its own, and of each part another one: the other may be
    written at the same time.
    """
    there, moved = out.is_dir(), list[Path]()
    partial = out / (f"{PARTIAL}-{only}" if only else PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.iterdir()):
            moved.append(path.rename(out / path.name))
        partial.rmdir()
    except BaseException as error:
        for place in [partial, *moved]:
            shutil.rmtree(place, ignore_errors=True)
        if not there:
            # Not what another export has put beside it meanwhile.
            with suppress(OSError):
                out.rmdir()
        if (told := disk_refuses(error, out.absolute())) is not None:
            raise ExportError(f"{out}: not written, and nothing left behind: {told}") from error
        raise


def exported_part(name: str | None) -> Exported | None:
    """What --only names.

    Raises:
        ConfigError: there is no such part.
    """
    parts: dict[str | None, Exported | None] = {None: None, "pipeline": "pipeline", "lora": "lora"}
    if name not in parts:
        raise ConfigError(f"--only {name!r}: pipeline or lora")
    return parts[name]


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
