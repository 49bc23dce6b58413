"""Checkpoints written behind the training: the state is copied to host memory, and a thread writes the copy.

Promises
- What is written is the state as it was when it was asked for, whatever the training does meanwhile.
- At most one is being written: another one waits for it. Host memory holds one copy of the state, for as
  long as it is being written.
- A write that failed is told by the next call of `check`, `write` or `finish`, in its own words. Until its
  manifest is there a checkpoint does not count (learner/checkpoint.py): whoever starts before that starts
  from the former one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from learner.checkpoint import CheckpointError, write_checkpoint

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
WRITE_DEADLINE_S = 3600.0
"""For one checkpoint behind the training, from when somebody waits for it."""


class CheckpointWriter:
    """Writes the checkpoints of a run.

    Args:
        run_directory: of the run.
        keep: complete checkpoints that stay.
        asynchronous: write behind the training (checkpoint.asynchronous); else `write` returns behind it.
    """

    def __init__(self, run_directory: Path, *, keep: int, asynchronous: bool) -> None:
        self._directory = run_directory
        self._write = partial(write_checkpoint, run_directory, keep=keep)
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._begun: Future[Path] | None = None

    def write(
        self, step: int, state: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
    ) -> None:
        """See learner/checkpoint.py `write_checkpoint`.

        Raises:
            CheckpointError: this one, or the one before it, could not be written.
        """
        self.finish()
        if self._thread is None:
            self._write(step, state, manifest)
        else:
            self._begun = self._thread.submit(self._write, step, copied(state), dict(manifest))

    def check(self) -> None:
        """Raises CheckpointError if what was being written could not be."""
        if self._begun is not None and self._begun.done():
            self.finish()

    def finish(self) -> None:
        """Wait until what was asked for is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            written(begun, self._directory)

    def close(self) -> None:
        """The run ends, perhaps by an error: what is being written may still be of use, and is waited for."""
        try:
            self.finish()
        except Exception:
            logger.exception("the last checkpoint was not written")


def written(begun: Future[Result], directory: Path) -> Result:
    """What a write behind the training has come to.

    Raises:
        CheckpointError: it could not be written, or is not by now.
    """
    # Not `result(timeout)`: a file system has time-outs of its own.
    if not wait([begun], WRITE_DEADLINE_S).done:
        raise CheckpointError(
            f"{directory}: a checkpoint was not written within {WRITE_DEADLINE_S:g} s: does the storage hang?"
        )
    return begun.result()


def copied(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """In host memory."""
    with torch.no_grad():
        return {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for part, tensors in state.items()
        }
