"""Checkpoints in the run directory: whole or not there.

Promises
- `checkpoints/step-N/` appears by one rename, after every file and the manifest are on the disk; the manifest
  is written last and holds the digest of every file.
- `newest_checkpoint` returns the newest one whose digests are right; others are skipped with a warning.
- A write that fails, for want of space or by a kill at any moment, leaves the former checkpoints usable.
- The one just written stays. Those of higher steps go: their lineage ended when a learner went back behind
  them. Only a learner that a newer epoch has replaced and that does not know it yet finds living ones there.

    checkpoints/step-20/policy.safetensors      trained parameters
                       ema.safetensors         the EMA that is evaluated
                       reference.safetensors   the EMA reference, when the objective has one
                       optimizer.safetensors   moments and steps
                       manifest.json           step, epoch, frontier, digests; last
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
# `.replaced`: what a step of an older lineage is called while the new one takes its name.
COMPLETE_NAME = re.compile(r"step-(\d+)(\.replaced)?")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; former ones are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    manifest: dict[str, Any]
    """What the writer gave, with `format`, `step` and `files` (name -> sha256, bytes, tensors)."""

    @property
    def state(self) -> Mapping[str, dict[str, Tensor]]:
        """Part -> tensors, on the CPU. A part is read from its file each time it is asked for."""
        return _Parts(self.path, tuple(self.manifest["files"]))


class _Parts(Mapping[str, dict[str, Tensor]]):
    def __init__(self, path: Path, files: tuple[str, ...]) -> None:
        self._files = {Path(name).stem: path / name for name in files}

    def __getitem__(self, part: str) -> dict[str, Tensor]:
        return load_file(self._files[part])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def write_checkpoint(
    run_directory: Path,
    step: int,
    state: Mapping[str, Mapping[str, Tensor]],
    manifest: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write `checkpoints/step-N/`, then remove all but the newest `keep`, and those of a dead lineage.

    Args:
        state: part -> tensors; a part becomes one safetensors file.
        manifest: JSON values to keep with it; `epoch`, where there is one, tells lineages apart.
        keep: complete checkpoints that stay, this one included.

    Raises:
        CheckpointError: it could not be written.
    """
    folder = run_directory / "checkpoints"
    final = folder / f"step-{step}"
    partial = folder / f".step-{step}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = {
            f"{part}.safetensors": _write(partial / f"{part}.safetensors", state[part]) for part in state
        }
        text = json.dumps({**manifest, "format": FORMAT, "step": step, "files": files}, indent=2)
        (partial / MANIFEST).write_text(text + "\n")
        _sync(partial / MANIFEST)
        _sync(partial)
        _take_name(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: not written: {error}; former checkpoints are as they were"
        ) from error
    _prune(folder, keep, step, manifest.get("epoch", 0))
    return final


def newest_checkpoint(run_directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint with right digests; None when there is none."""
    for path in _candidates(run_directory / "checkpoints"):
        try:
            return _verified(path)
        except CheckpointError as error:
            logger.warning("skipped a checkpoint: %s", error)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint by its directory.

    Raises:
        CheckpointError: it is not there, not whole, or a digest differs.
    """
    return _verified(path)


def _write(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    _sync(file)
    return {"sha256": _digest(file), "bytes": file.stat().st_size, "tensors": len(tensors)}


def _take_name(partial: Path, final: Path) -> None:
    # A run that went back may reach a step again: the old one stays readable till the new one is there.
    aside = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def _verified(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {str(name): dict(entry) for name, entry in manifest["files"].items()}
        step, version = int(manifest["step"]), manifest["format"]
        if version != FORMAT:
            raise CheckpointError(f"{path}: format {version}, this version reads format {FORMAT}")
        if not files:
            raise CheckpointError(f"{path}: the manifest names no file")
        for name, entry in files.items():
            if Path(name).name != name:
                raise CheckpointError(f"{path}: the manifest names a file outside the checkpoint: {name!r}")
            if _digest(path / name) != entry["sha256"]:
                raise CheckpointError(
                    f"{path / name}: its sha256 is not the manifest's: changed or cut short"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint: {error!r}") from error
    return Checkpoint(path=path, step=step, manifest=manifest)


def _candidates(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob("step-*") if COMPLETE_NAME.fullmatch(path.name)]
    yield from sorted(found, key=lambda path: (_step(path), path.suffix == ""), reverse=True)


def _prune(folder: Path, keep: int, step: int, epoch: int) -> None:
    kept = 0
    for path in _candidates(folder):
        if _step(path) > step:
            if _epoch(path) <= epoch:
                shutil.rmtree(path, ignore_errors=True)
        # Only what has a manifest counts: a broken directory must not push out a good one.
        elif kept >= keep:
            shutil.rmtree(path, ignore_errors=True)
        elif (path / MANIFEST).is_file():
            kept += 1


def _step(path: Path) -> int:
    match = COMPLETE_NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else -1


def _epoch(path: Path) -> int:
    """Of its writer; -1 for what nobody can resume from."""
    try:
        return int(json.loads((path / MANIFEST).read_text()).get("epoch", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return -1


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
