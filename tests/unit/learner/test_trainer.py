"""A real trainer begins where the newest whole checkpoint is, also where storage shows that one late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharded_runs import state_of, train, trainer_of, version
from tenacity import stop_after_attempt, wait_none

from learner import trainer as module
from learner.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointsUnusable,
    open_checkpoint,
    write_checkpoint,
)
from learner.loop import Start
from services.group_queue import Frontier

CURRICULUM = "prompts.curriculum.after=2"


def test_a_run_without_a_checkpoint_begins_at_its_start(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, None)
    before = state_of(trainer)
    assert trainer.begin() == Start()
    after = state_of(trainer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_run_goes_on_bit_for_bit_behind_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    first = trainer_of(tmp_path, None, CURRICULUM)
    assert first.curriculum is not None
    train(first, range(1))
    frontier = Frontier(below=2, above=(3,))
    first.curriculum.assign(frontier)
    first.checkpoint(version(1), frontier)
    places = first.curriculum.places()
    losses = train(first, range(1, 2))
    first.curriculum.assign(Frontier(below=9))
    first.checkpoint(version(2), Frontier(below=9))
    (tmp_path / "checkpoints" / "step-2" / "optimizer.safetensors").write_bytes(b"torn")

    second = trainer_of(tmp_path, None, CURRICULUM)
    start = second.begin()
    assert (start.version, start.frontier) == (version(1), frontier)
    (told,) = start.passed_over
    assert "step-2/optimizer.safetensors" in told and told.endswith("and the run goes on from step 1")
    assert (tmp_path / "checkpoints" / "step-2.unverified" / "optimizer.safetensors").read_bytes() == b"torn"
    assert second.curriculum is not None and second.curriculum.places() == places
    assert train(second, range(1, 2)) == losses
    ours, theirs = state_of(second), state_of(first)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_at_step_0(tmp_path: Path) -> None:
    first = trainer_of(tmp_path, None)
    first.checkpoint(version(1), Frontier(below=2))
    (tmp_path / "checkpoints" / "step-1" / "policy.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointsUnusable, match=r"step-1/policy\.safetensors: its sha256"):
        trainer_of(tmp_path, None).begin()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


@pytest.fixture
def shown_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    """Where a checkpoint will be at the second look, and those who looked; nobody waits between looks."""
    place = write_checkpoint(tmp_path, 3, {"policy": {"w": torch.ones(3)}}, {}, keep=1)
    hidden, looks = place.rename(tmp_path / "hidden"), list[Path]()

    def look(path: Path) -> Checkpoint:
        looks.append(path)
        if len(looks) == 2:
            hidden.rename(path)
        return open_checkpoint(path)

    monkeypatch.setattr(module, "open_checkpoint", look)
    monkeypatch.setattr(module._opened.retry, "wait", wait_none())
    return place, looks


def test_a_checkpoint_that_storage_shows_late_is_waited_for(shown_late: tuple[Path, list[Path]]) -> None:
    place, looks = shown_late
    assert module._opened(place).step == 3
    assert looks == [place] * 2


def test_a_checkpoint_that_does_not_come_is_named(
    shown_late: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = shown_late
    monkeypatch.setattr(module._opened.retry, "stop", stop_after_attempt(1))
    with pytest.raises(CheckpointError, match=f"{place}: not a complete checkpoint"):
        module._opened(place)
