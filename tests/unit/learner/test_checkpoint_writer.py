"""A checkpoint written behind the training is that of when it was asked for, and its failure is told."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import checkpoint, checkpoint_writer
from learner.checkpoint import CheckpointError, newest_checkpoint
from learner.checkpoint_writer import CheckpointWriter, written
from learner.trainer import PolicyTrainer
from services.full_disk import disk_refuses

State = dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def state() -> State:
    return {"policy": {"w": torch.zeros(3)}}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No file is written before it is open."""
    opened, write = threading.Event(), checkpoint.write_part

    def behind_it(*given: Any) -> Any:
        assert opened.wait(60)
        return write(*given)

    monkeypatch.setattr(checkpoint, "write_part", behind_it)
    return opened


def newest(run: Path) -> tuple[int, float] | None:
    found = newest_checkpoint(run)
    return None if found is None else (found.step, float(found.state["policy"]["w"][0]))


def test_what_is_written_is_the_state_of_then_and_counts_once_it_is_whole(
    tmp_path: Path, state: State, gate: threading.Event
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, asynchronous=True)
    writer.write(1, state, {"epoch": 0})
    state["policy"]["w"] += 7
    writer.check()
    assert newest(tmp_path) is None
    gate.set()
    writer.finish()
    assert newest(tmp_path) == (1, 0.0)


def test_one_at_most_is_being_written(tmp_path: Path, state: State, gate: threading.Event) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, asynchronous=True)
    writer.write(1, state, {"epoch": 0})
    state["policy"]["w"] += 7
    second = threading.Thread(target=writer.write, args=(2, state, {"epoch": 0}))
    second.start()
    # Nothing but the first one's end lets the second begin, and it copies what it finds then.
    second.join(0.2)
    assert second.is_alive()
    state["policy"]["w"] += 1
    gate.set()
    second.join(60)
    assert not second.is_alive()
    writer.close()
    assert newest(tmp_path) == (2, 8.0)


def failed(run: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> CheckpointWriter:
    def flush(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = CheckpointWriter(run, keep=2, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        writer.write(1, state, {"epoch": 0})
        assert writer._begun is not None
        wait([writer._begun])
    return writer


def update(writer: CheckpointWriter, state: State) -> None:
    trainer = object.__new__(PolicyTrainer)
    trainer._writer = writer
    trainer.update([], 1)


@pytest.mark.parametrize(
    "then",
    [
        update,
        lambda writer, state: writer.check(),
        lambda writer, state: writer.finish(),
        lambda writer, state: writer.write(2, state, {"epoch": 0}),
    ],
    ids=["update", "check", "finish", "write"],
)
def test_a_write_that_failed_is_told_at_the_next_step(
    then: Callable[[CheckpointWriter, State], None],
    tmp_path: Path,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckpointError, match="step-1: not written") as caught:
        then(failed(tmp_path, state, monkeypatch), state)
    told = disk_refuses(caught.value, tmp_path)
    assert told is not None and told.endswith(f"free space in {tmp_path}")


def test_a_write_that_hangs_is_told(
    tmp_path: Path, state: State, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "WRITE_DEADLINE_S", 0.0)
    writer = CheckpointWriter(tmp_path, keep=2, asynchronous=True)
    writer.write(1, state, {"epoch": 0})
    with pytest.raises(CheckpointError, match=r"was not written within 0 s: does the storage hang\?"):
        writer.finish()
    gate.set()


def test_a_time_out_of_the_file_system_is_no_hanging_write(tmp_path: Path) -> None:
    begun, timed_out = Future[Path](), OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    begun.set_exception(timed_out)
    with pytest.raises(TimeoutError) as caught:
        written(begun, tmp_path)
    assert caught.value is timed_out


def test_a_run_that_ends_by_an_error_keeps_its_words_and_the_checkpoint(
    tmp_path: Path, state: State, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, asynchronous=True)
    writer.write(1, state, {"epoch": 0})
    gate.set()
    writer.close()
    assert newest(tmp_path) == (1, 0.0)
    failed(tmp_path, state, monkeypatch).close()
    assert "the last checkpoint was not written" in caplog.text
