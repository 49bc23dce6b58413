"""A checkpoint is whole or not there, whatever interrupts its writing."""

from __future__ import annotations

import json
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import checkpoint
from learner.checkpoint import CheckpointError, newest_checkpoint, read_checkpoint, write_checkpoint
from learner.checkpoint_writer import CheckpointWriter
from tests.dying import dies_before

STAGES = ("mkdir", "save_file", "_sync", "sha256_of", "write_text", "rename", "rmtree")


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "policy": {"w": torch.full((300,), value), "b": torch.tensor(value)},
        "optimizer": {"step": torch.tensor([value])},
    }


def write(run: Path, step: int, *, keep: int = 10, value: float | None = None, epoch: int = 2) -> Path:
    value = float(step) if value is None else value
    manifest = {"epoch": epoch, "frontier": {"resolved": step}}
    return write_checkpoint(run, step, state(value), manifest, keep=keep)


def newest(run: Path) -> tuple[int, float]:
    found = newest_checkpoint(run)
    assert found is not None
    return found.step, float(found.state["policy"]["b"])


def test_round_trip(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    path = write(tmp_path, 20)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert path == found.path == tmp_path / "checkpoints" / "step-20"
    assert found.manifest["epoch"] == 2
    assert found.manifest["frontier"] == {"resolved": 20}
    assert found.manifest["step"] == found.step == 20
    assert found.manifest["files"]["policy.safetensors"]["tensors"] == 2
    assert {part: set(tensors) for part, tensors in found.state.items()} == {
        "policy": {"w", "b"},
        "optimizer": {"step"},
    }
    assert torch.equal(found.state["policy"]["w"], torch.full((300,), 20.0))
    assert read_checkpoint(path).step == 20


def test_newest_is_by_number_and_old_ones_go(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-100"]
    assert newest(tmp_path) == (100, 100.0)


@pytest.mark.parametrize("damaged", [True, False])
def test_the_one_just_written_outlives_a_dead_lineage(tmp_path: Path, damaged: bool) -> None:
    """A learner that went back behind step 20, of which the manifest alone may be whole."""
    dead = write(tmp_path, 20, epoch=0)
    if damaged:
        (dead / "policy.safetensors").unlink()
    assert write(tmp_path, 12, keep=1, epoch=1).is_dir()
    assert newest(tmp_path) == (12, 12.0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-12"]


def test_a_replaced_learner_removes_nothing_of_its_successor(tmp_path: Path) -> None:
    write(tmp_path, 20, epoch=3)
    write(tmp_path, 19, keep=1, epoch=2)
    assert newest(tmp_path) == (20, 20.0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "file", "manifest", "json", "format", "outside"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    last = write(tmp_path, 2)
    file, manifest = last / "policy.safetensors", last / "manifest.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "file":
        file.unlink()
    elif damage == "manifest":
        manifest.unlink()
    elif damage == "json":
        manifest.write_text(manifest.read_text()[:40])
    else:
        content: dict[str, Any] = json.loads(manifest.read_text())
        if damage == "format":
            content["format"] = 99
        else:
            content["files"] = {"../../x.safetensors": content["files"]["policy.safetensors"]}
        manifest.write_text(json.dumps(content))
    assert newest(tmp_path) == (1, 1.0)
    assert "step-2" in caplog.text
    with pytest.raises(CheckpointError, match="step-2"):
        read_checkpoint(last)


def _write_behind(run: Path, step: int, value: float) -> None:
    writer = CheckpointWriter(run, keep=10, asynchronous=True)
    writer.write(step, state(value), {"epoch": 2})
    writer.finish()


def _die_at(run: Path, stage: str, nth: int, step: int, behind: bool) -> None:
    """Write a checkpoint and end the process, without a word, before the n-th call of a stage."""
    deadly = dies_before(nth)
    if stage in ("save_file", "_sync", "sha256_of"):
        setattr(checkpoint, stage, deadly(getattr(checkpoint, stage)))
    elif stage == "rmtree":
        checkpoint.shutil.rmtree = deadly(checkpoint.shutil.rmtree)
    else:
        setattr(Path, stage, deadly(getattr(Path, stage)))
    if behind:
        _write_behind(run, step, 77.0)
    else:
        write(run, step, value=77.0)


@pytest.mark.parametrize(
    ("again", "behind"),
    [(False, False), (True, False), (True, True)],
    ids=["new step", "same step again", "behind the training"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(
    tmp_path: Path, stage: str, again: bool, behind: bool
) -> None:
    """And the next write of that step succeeds."""
    context = multiprocessing.get_context("fork")
    step = 4 if again else 5
    for nth in range(1, 9):
        run = tmp_path / str(nth)
        write(run, 3)
        write(run, 4)
        child = context.Process(target=_die_at, args=(run, stage, nth, step, behind))
        child.start()
        child.join(timeout=60)
        assert child.exitcode in (0, 9)
        found = newest(run)
        assert found in {(4, 4.0), (step, 77.0)}
        if child.exitcode == 0:
            assert found == (step, 77.0)
            break
        write(run, step, value=78.0)
        assert newest(run) == (step, 78.0)
    assert child.exitcode == 0, "every call of the stage was reached"


def _write_with_little_room(run: Path, answer: Any) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write(run, 5)
    except CheckpointError as error:
        answer.put(str(error))


def test_no_room_on_the_disk_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4)
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_write_with_little_room, args=(tmp_path, answer))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert "former checkpoints are as they were" in answer.get()
    assert newest(tmp_path) == (4, 4.0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-4"]


def test_a_manifest_that_names_no_file_hides_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    empty = write(tmp_path, 2)
    (empty / "manifest.json").write_text('{"format": 1, "step": 2, "files": {}}')
    assert newest(tmp_path) == (1, 1.0)
