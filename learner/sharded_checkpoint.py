"""Checkpoints of sharded training: every rank writes its rows, rank 0 the manifest.

    checkpoints/step-20/policy/shard-00001-model-00001-of-00001.safetensors    rows of rank 0
                       policy/shard-00002-...                                 rows of rank 1; and so on,
                                                                              in several files each
                       ema/, reference/, optimizer/                           the same
                       manifest.json                                          with the digest of each; last

The files are those of torch.distributed.checkpoint, from which any number of ranks reads its rows, and one
process whole tensors (services/checkpoint_parts.py).

Promises
- Those of learner/checkpoint_writer.py. A checkpoint is whole when every rank has said what it wrote; what
  one could not write is told on all of them.
- No rank holds more of the state in host memory than its own rows, and a file of them as bytes (256 MiB, or
  one tensor's rows that are larger). Making those is what training may have to wait for, in another thread or
  not: Python does nothing else meanwhile.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from learner.checkpoint import (
    Checkpoint,
    CheckpointError,
    complete,
    described,
    partial_of,
    prepare,
    write_part,
)
from learner.checkpoint_writer import copied, written
from learner.curriculum import PART
from learner.optimizer import MOMENTS
from learner.ranks import Order, Ranks
from learner.trained import State
from services.checkpoint_parts import SUFFIX, files_of, load_into, shapes_of_part
from services.full_disk import disk_refuses
from services.pieces import in_pieces

if TYPE_CHECKING:
    from policy.sharding import Shards

logger = logging.getLogger(__name__)

FILE_BYTES = 256 * 1024**2


class CheckpointRefused(RuntimeError):
    """The disk of a rank took no more, which a restart does not mend."""


class ShardedCheckpointWriter:
    """What one rank does for the checkpoints of a run; rank 0 says when.

    Args:
        ranks: which write together.
        shards: whose rows are written.
        run_directory: of the run, on storage that all ranks share.
        keep: complete checkpoints that stay.
        asynchronous: write behind the training (checkpoint.asynchronous).
    """

    def __init__(
        self, ranks: Ranks, shards: Shards, run_directory: Path, *, keep: int, asynchronous: bool
    ) -> None:
        self._ranks, self._shards = ranks, shards
        self._directory, self._keep, self._asynchronous = run_directory, keep, asynchronous
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._begun: Future[dict[str, Any]] | None = None
        self._step = -1
        self._manifest: Mapping[str, Any] = {}

    def write(
        self, step: int, state: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
    ) -> None:
        """Of rank 0, while the others listen: have all ranks write; see learner/checkpoint.py
        `write_checkpoint`.

        Raises:
            CheckpointError: it could not be begun or, unless it is written behind the training, not written.
            RankFailed: the same, of another rank.
        """
        self.finish()
        prepare(self._directory, step)
        self._ranks.order_all(Order(do="checkpoint", step=step))
        self.begin(step, state)
        self._ranks.settled()
        self._manifest = manifest
        if not self._asynchronous:
            self.finish()

    def begin(self, step: int, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Of every rank: copy its rows, and begin to write them."""
        self._step = step
        self._begun = self._thread.submit(self._write_own, partial_of(self._directory, step), copied(state))

    def check(self) -> None:
        """Of rank 0: complete what all have written.

        Raises:
            CheckpointError, RankFailed: one could not.
        """
        self._settle(wait=False)

    def finish(self) -> None:
        """The same, and wait for it."""
        self._settle(wait=True)

    def close(self) -> None:
        """The run ends, perhaps by an error: what is being written may still be of use, where the other ranks
        can be asked for it."""
        if self._begun is None:
            return
        try:
            if not self._ranks.listening:
                raise CheckpointError("the other ranks are in the middle of something else, or gone")
            self.finish()
        except Exception:
            logger.exception("the checkpoint of step %d was not completed", self._step)

    def settle(self, *, wait: bool) -> list[dict[str, Any]] | None:
        """Of every rank: what each has written; None: one of them is not done yet.

        Raises:
            CheckpointRefused, CheckpointError: this rank could not write.
            RankFailed: another one could not.
        """
        assert self._begun is not None
        heard = self._ranks.exchange(
            f"the checkpoint of step {self._step}", partial(self._written, self._begun, wait)
        )
        if not all(heard):
            return None
        self._begun = None
        return [json.loads(text) for text in heard]

    def _settle(self, *, wait: bool) -> None:
        if self._begun is None:
            return
        self._ranks.order_all(Order(do="settle", step=self._step, wait=wait))
        try:
            found = self.settle(wait=wait)
        except Exception:
            shutil.rmtree(partial_of(self._directory, self._step), ignore_errors=True)
            raise
        self._ranks.settled()
        if found is not None:
            files = {name: entry for one in found for name, entry in one.items()}
            complete(self._directory, self._step, files, self._manifest, keep=self._keep)

    def _written(self, begun: Future[dict[str, Any]], wait: bool) -> bytes:
        if not wait and not begun.done():
            return b""
        try:
            return json.dumps(written(begun, self._directory)).encode()
        except Exception as error:
            told = disk_refuses(error, self._directory)
            if told is not None:
                raise CheckpointRefused(f"{told}, then go on with --resume") from error
            raise

    def _write_own(self, folder: Path, state: State) -> dict[str, Any]:
        try:
            files: dict[str, Any] = {}
            for part, tensors in state.items():
                if not any(_tensor_of(name) in self._shards.shapes for name in tensors):
                    # Of no rank in particular: rank 0 alone has it.
                    files[f"{part}{SUFFIX}"] = write_part(folder / f"{part}{SUFFIX}", tensors)
                    continue
                write_rows(folder / part, self._shards, tensors)
                own = [file for file in files_of(folder / part) if _number(file) == self._shards.rank + 1]
                files |= {f"{part}/{file.name}": described(file) for file in own}
            return files
        except Exception as error:
            raise CheckpointError(
                f"{folder}: rank {self._shards.rank} has not written its rows: {error}; former checkpoints "
                "are as they were"
            ) from error


def write_rows(directory: Path, shards: Shards, tensors: Mapping[str, Tensor]) -> None:
    """One rank's files of a part: rows of sharded tensors, and of rank 0 what is whole too."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    directory.mkdir(exist_ok=True)
    named = {
        name: shards.whole(_tensor_of(name), rows) if _tensor_of(name) in shards.shapes else rows
        for name, rows in tensors.items()
        if _tensor_of(name) in shards.shapes or shards.rank == 0
    }
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    # What describes a file brings it to the disk.
    writer.sync_files = False
    planner = DefaultSavePlanner()
    writer.set_up_storage_writer(shards.rank == 0)
    planner.set_up_planner(named, is_coordinator=shards.rank == 0)
    # Each rank plans for itself: which rows are whose is known, so there is nothing to agree on.
    into = {"shard_index": shards.rank + 1, "fqn_to_index_mapping": _files(named, tensors)}
    plan = replace(planner.create_local_plan(), storage_data=into)
    writer.write_data(planner.finish_plan(plan), planner).wait()


def _files(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which of its files of a part a rank writes a tensor into, counted from 1."""
    pieces = in_pieces(names, lambda name: tensors[name].nbytes, FILE_BYTES)
    return {name: number for number, piece in enumerate(pieces, start=1) for name in piece}


def read_rows(checkpoint: Checkpoint, shards: Shards, like: State) -> State:
    """This rank's rows of a checkpoint, of whatever number of ranks.

    Args:
        like: this rank's state: which parts and tensors it must have.

    Raises:
        ValueError: a part or a tensor is missing, unknown or of another shape.
    """
    found = set(checkpoint.state) - {PART}
    if found != like.keys():
        raise ValueError(f"{checkpoint.path}: has parts {sorted(found)}, expected {sorted(like)}")
    return {part: _rows_of_part(checkpoint.path, part, shards, like[part]) for part in like}


def _rows_of_part(folder: Path, part: str, shards: Shards, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    file = folder / f"{part}{SUFFIX}"
    wanted = {name: shards.shapes.get(_tensor_of(name), tensor.shape) for name, tensor in like.items()}
    if not file.is_file():
        _check(
            folder, part, wanted, {name: shape for name, (shape, _) in shapes_of_part(folder, part).items()}
        )
        rows = {name: torch.empty_like(tensor, device="cpu") for name, tensor in like.items()}
        targets: dict[str, Any] = {
            name: shards.whole(_tensor_of(name), tensor) if _tensor_of(name) in shards.shapes else tensor
            for name, tensor in rows.items()
        }
        load_into(folder / part, targets)
        return rows
    opened: Callable[..., Any] = safe_open
    with opened(file, framework="pt") as stored:
        names = stored.keys()
        _check(folder, part, wanted, {name: torch.Size(stored.get_slice(name).get_shape()) for name in names})
        return {
            name: (
                stored.get_slice(name)[shards.rows(_tensor_of(name), shards.rank)]
                if _tensor_of(name) in shards.shapes
                else stored.get_tensor(name)
            )
            for name in like
        }


def _check(
    folder: Path, part: str, wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size]
) -> None:
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differ:
        raise ValueError(
            f"{folder}: state of {part}: {len(differ)} tensors are missing, unknown or of another shape, "
            f"first {differ[0]!r}; was it written with another model or model.train?"
        )


def _tensor_of(name: str) -> str:
    """The trained tensor that one of a part belongs to; the optimizer has several of each."""
    for moment in MOMENTS:
        if name.startswith(f"{moment}."):
            return name.removeprefix(f"{moment}.")
    return name


def _number(file: Path) -> int:
    """Of the rank that wrote it, from 1."""
    return int(file.name.split("-")[1])
