"""Checkpoints in the run directory: whole or not there.

Promises
- `checkpoints/step-N/` appears by one rename, after every file and the manifest are on the disk; the manifest
  is written last and holds the digest of every file.
- `newest_checkpoint` returns the newest one whose digests are right, and says which newer ones are not. Where
  there are some and none is right, that is an error: nobody begins anew over them.
- A write that fails, for want of space or by a kill at any moment, leaves the former checkpoints usable.
- The one just written stays. Those of higher steps go: their lineage ended when a learner went back behind
  them. Only a learner that a newer epoch has replaced and that does not know it yet finds living ones there.
- What cannot be verified is never removed: `set_aside` gives it another name, and pruning leaves it alone.

    checkpoints/step-20/policy.safetensors      trained parameters
                       ema.safetensors         the EMA that is evaluated
                       reference.safetensors   the EMA reference, when the objective has one
                       optimizer.safetensors   moments and steps
                       manifest.json           step, epoch, frontier, digests; last

Of sharded training the parts are directories (learner/sharded_checkpoint.py).
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from tenacity import before_sleep_log, retry, retry_if_exception_type, stop_after_attempt, wait_fixed
from torch import Tensor

from learner.checkpoint_manifest import MANIFEST, read_manifest, write_manifest
from services.checkpoint_parts import SUFFIX, digest_of, part_of, read_part, sha256_of

logger = logging.getLogger(__name__)

READS = 3
"""Of a checkpoint: storage behind a network fails for a moment."""
BETWEEN_READS_S = 1.0
# `.replaced`: what a step of an older lineage is called while the new one takes its name.
COMPLETE_NAME = re.compile(r"step-(\d+)(\.replaced)?")
UNVERIFIED = ".unverified"
"""Behind the name of one that is kept for a person to look at."""
REMOVED = ".removed"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; former ones are as they were."""


class StorageError(CheckpointError):
    """The storage could not read what is there."""


class CheckpointsUnusable(CheckpointError):
    """A run has checkpoints, and none of them is right. No restart mends that."""


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not right."""

    path: Path
    why: str
    """Names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    manifest: dict[str, Any]
    """What the writer gave, with `format`, `step` and `files` (name -> sha256, bytes)."""
    passed_over: tuple[PassedOver, ...] = ()
    """Newer ones, when this one was looked for."""

    @property
    def state(self) -> Mapping[str, dict[str, Tensor]]:
        """Part -> tensors, on the CPU. A part is read from its file each time it is asked for."""
        return _Parts(self.path, tuple(self.manifest["files"]))

    def digest(self, part: str) -> str | None:
        """Hex; the same for no two contents of a part. None: it has no such part."""
        files = {name: entry for name, entry in self.manifest["files"].items() if part_of(name) == part}
        return digest_of([str(files[name]["sha256"]) for name in sorted(files)]) if files else None


class _Parts(Mapping[str, dict[str, Tensor]]):
    def __init__(self, path: Path, files: tuple[str, ...]) -> None:
        self._path = path
        self._parts = dict.fromkeys(part_of(file) for file in files)

    def __getitem__(self, part: str) -> dict[str, Tensor]:
        if part not in self._parts:
            raise KeyError(part)
        return read_part(self._path, part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


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
    partial = prepare(run_directory, step)
    with _told(partial):
        files = {
            f"{part}{SUFFIX}": write_part(partial / f"{part}{SUFFIX}", tensors)
            for part, tensors in state.items()
        }
    return complete(run_directory, step, files, manifest, keep=keep)


def partial_of(run_directory: Path, step: int) -> Path:
    """Where the files of a checkpoint are until it is one."""
    return run_directory / "checkpoints" / f".step-{step}.partial"


def prepare(run_directory: Path, step: int) -> Path:
    """An empty directory for the files of a checkpoint, which is none before `complete`.

    Raises:
        CheckpointError: it cannot be made.
    """
    partial = partial_of(run_directory, step)
    with _told(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    return partial


def complete(
    run_directory: Path, step: int, files: Mapping[str, Any], manifest: Mapping[str, Any], *, keep: int
) -> Path:
    """What `prepare` made, and has files now, becomes a checkpoint; see `write_checkpoint`.

    Args:
        files: name -> what `described` says of it.

    Raises:
        CheckpointError: it could not be written.
    """
    partial = partial_of(run_directory, step)
    folder = partial.parent
    final = folder / f"step-{step}"
    with _told(partial):
        _sync(write_manifest(partial, step, files, manifest))
        for place in sorted({(partial / name).parent for name in files} | {partial}):
            _sync(place)
        _take_name(partial, final)
        _sync(folder)
    _prune(folder, keep, step, manifest.get("epoch", 0))
    return final


@contextmanager
def _told(partial: Path) -> Iterator[None]:
    """What goes wrong inside leaves nothing behind but its words."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        final = partial.with_name(partial.stem.removeprefix("."))
        raise CheckpointError(
            f"{final}: not written: {error}; former checkpoints are as they were"
        ) from error


def newest_checkpoint(run_directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint with right digests; None when there is none at all.

    Raises:
        CheckpointsUnusable: there are some, and none is right.
        CheckpointError: it cannot be seen which there are.
    """
    return _newest(run_directory, read_checkpoint)


def newest_step(run_directory: Path) -> int:
    """Of the newest checkpoint by manifests and sizes, which takes no time; 0 when there is none at all.

    Raises:
        CheckpointError: as `newest_checkpoint`.
    """
    found = _newest(run_directory, open_checkpoint)
    return found.step if found is not None else 0


def _newest(run_directory: Path, read: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    passed_over: list[PassedOver] = []
    for path in _candidates(run_directory / "checkpoints"):
        try:
            return replace(_patient(read)(path), passed_over=tuple(passed_over))
        except CheckpointError as error:
            logger.warning("passed over a checkpoint: %s", error)
            passed_over.append(PassedOver(path, str(error)))
    if not passed_over:
        return None
    each = "".join(f"  {one.path.name}: {one.why}\n" for one in passed_over)
    raise CheckpointsUnusable(
        f"{run_directory / 'checkpoints'}: none of its checkpoints can be used, and all are as they were:\n"
        f"{each}Mend what keeps one from being read (the storage, the version of this program), or put a "
        "copy of one in its place, and resume; to begin at step 0 instead, start a new run"
    )


def _patient(read: Callable[[Path], Checkpoint]) -> Callable[[Path], Checkpoint]:
    again, told = retry_if_exception_type(StorageError), before_sleep_log(logger, logging.WARNING)
    stop, pause = stop_after_attempt(READS), wait_fixed(BETWEEN_READS_S)
    return retry(retry=again, stop=stop, wait=pause, before_sleep=told, reraise=True)(read)


def set_aside(found: Checkpoint) -> list[str]:
    """Keep what was passed over for a checkpoint under another name, before pruning or a new one of its step
    finds it.

    Returns:
        What to tell of each.

    Raises:
        CheckpointError: it cannot be renamed, so that it could be lost.
    """
    told = []
    for one in found.passed_over:
        kept = one.path.with_name(f"{one.path.name}{UNVERIFIED}")
        for number in itertools.count(2):
            if not kept.exists():
                break
            kept = one.path.with_name(f"{one.path.name}{UNVERIFIED}-{number}")
        try:
            one.path.rename(kept)
        except OSError as error:
            raise CheckpointError(f"{one.path}: cannot be kept as {kept.name}: {error}") from error
        told.append(f"{one.why}; kept as {kept.name}, and the run goes on from step {found.step}")
    return told


def open_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint by its directory, which another process has verified.

    Raises:
        CheckpointError: it is not there, its manifest cannot be read, or a file of it is not as long as that
            says: shared storage may show this node an older state of the directory.
    """
    opened = _opened(path)
    for name, entry in opened.manifest["files"].items():
        file = path / name
        try:
            found = file.stat()
            whole = S_ISREG(found.st_mode) and found.st_size == entry["bytes"]
        except (FileNotFoundError, NotADirectoryError):
            whole = False
        except OSError as error:
            raise StorageError(f"{file}: cannot be seen: {error}") from error
        if not whole:
            raise CheckpointError(f"{file}: not there, or not the {entry['bytes']} bytes of the manifest")
    return opened


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint by its directory.

    Raises:
        CheckpointError: it is not there, not whole, or a digest differs.
    """
    found = _opened(path)
    try:
        for name, entry in found.manifest["files"].items():
            if sha256_of(path / name) != entry["sha256"]:
                raise CheckpointError(
                    f"{path / name}: its sha256 is not the manifest's: changed or cut short"
                )
    except OSError as error:
        raise _unread(path, error) from error
    return found


def write_part(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """One part as one file; returns what the manifest says of it."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    return described(file) | {"tensors": len(tensors)}


def described(file: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on the disk from then on."""
    _sync(file)
    return {"sha256": sha256_of(file), "bytes": file.stat().st_size}


def _take_name(partial: Path, final: Path) -> None:
    # A run that went back may reach a step again: the old one stays readable till the new one is there.
    aside = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def _remove(path: Path) -> None:
    """Under a name that is none of a checkpoint: one half removed would pass for a damaged one."""
    gone = path.with_name(f".{path.name}{REMOVED}")
    try:
        path.rename(gone)
    except OSError as error:
        logger.warning("%s: an old checkpoint cannot be removed: %s", path, error)
    shutil.rmtree(gone, ignore_errors=True)


def _opened(path: Path) -> Checkpoint:
    try:
        manifest = read_manifest(path)
    except OSError as error:
        raise _unread(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a complete checkpoint: its {MANIFEST}: {error}") from error
    step = int(manifest["step"])
    if COMPLETE_NAME.fullmatch(path.name) and step != _step(path):
        raise CheckpointError(f"{path}: its {MANIFEST} is that of step {step}")
    return Checkpoint(path=path, step=step, manifest=manifest)


def _unread(path: Path, error: OSError) -> CheckpointError:
    """A file that is not there is what it is; another error may be the storage's, of this moment."""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    kind = CheckpointError if missing else StorageError
    return kind(f"{path}: not a complete checkpoint: {error}")


def _candidates(folder: Path) -> Iterator[Path]:
    try:
        found = [path for path in folder.iterdir() if COMPLETE_NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    yield from sorted(found, key=lambda path: (_step(path), path.suffix == ""), reverse=True)


def _prune(folder: Path, keep: int, step: int, epoch: int) -> None:
    for path in folder.glob(f".step-*{REMOVED}"):
        shutil.rmtree(path, ignore_errors=True)
    kept = 0
    for path in _candidates(folder):
        try:
            of_epoch = int(open_checkpoint(path).manifest.get("epoch", 0))
        except (CheckpointError, ValueError, TypeError):
            # Nor does it count: a broken directory must not push out a good one.
            continue
        if _step(path) > step:
            if of_epoch <= epoch:
                _remove(path)
        elif kept >= keep:
            _remove(path)
        else:
            kept += 1


def _step(path: Path) -> int:
    match = COMPLETE_NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else -1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
