"""A checkpoint is whole or not there, whatever interrupts its writing."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import checkpoint
from learner.checkpoint import (
    READS,
    CheckpointError,
    CheckpointsUnusable,
    newest_checkpoint,
    newest_step,
    read_checkpoint,
    set_aside,
    write_checkpoint,
)
from learner.checkpoint_writer import CheckpointWriter
from services.checkpoint_parts import sha256_of
from tests.dying import dies_before
from tests.forks import forks

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


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


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
    assert names(tmp_path) == ["step-10", "step-100"]
    assert newest(tmp_path) == (100, 100.0)


def test_the_one_just_written_outlives_a_dead_lineage(tmp_path: Path) -> None:
    """A learner that went back behind step 20."""
    write(tmp_path, 20, epoch=0)
    assert write(tmp_path, 12, keep=1, epoch=1).is_dir()
    assert newest(tmp_path) == (12, 12.0)
    assert names(tmp_path) == ["step-12"]


@pytest.mark.parametrize("step", [2, 20])
@pytest.mark.parametrize("file", ["policy.safetensors", "manifest.json"])
def test_pruning_removes_nothing_that_cannot_be_opened(tmp_path: Path, step: int, file: str) -> None:
    """Nor does it count: with `keep=1` the newest whole one stays too."""
    (write(tmp_path, step, epoch=0) / file).unlink()
    for whole in (11, 12):
        write(tmp_path, whole, keep=1)
    assert names(tmp_path) == sorted(["step-12", f"step-{step}"])


def test_a_replaced_learner_removes_nothing_of_its_successor(tmp_path: Path) -> None:
    write(tmp_path, 20, epoch=3)
    write(tmp_path, 19, keep=1, epoch=2)
    assert newest(tmp_path) == (20, 20.0)


DAMAGES = (
    "cut",
    "flipped",
    "file",
    "unreadable",
    "manifest",
    "json",
    "format",
    "outside",
    "entry",
    "number",
    "renamed",
)


def damage(checkpoint: Path, how: str) -> None:
    file, manifest = checkpoint / "policy.safetensors", checkpoint / "manifest.json"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif how == "file":
        file.unlink()
    elif how == "unreadable":
        file.unlink()
        file.mkdir()
    elif how == "manifest":
        manifest.unlink()
    elif how == "json":
        manifest.write_text(manifest.read_text()[:40])
    else:
        content: dict[str, Any] = json.loads(manifest.read_text())
        if how == "number":
            content["frontier"]["resolved"] += 1
        else:
            # As of a version that wrote none.
            del content["sha256"]
        if how == "format":
            content["format"] = 99
        elif how == "entry":
            del content["files"]["policy.safetensors"]["bytes"]
        elif how == "renamed":
            content["step"] = 7
        elif how == "outside":
            content["files"] = {"../../x.safetensors": content["files"]["policy.safetensors"]}
        manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_told_and_kept(tmp_path: Path, how: str) -> None:
    write(tmp_path, 1)
    last = write(tmp_path, 2)
    damage(last, how)
    of_manifest = ("manifest", "json", "entry", "outside")
    named = dict.fromkeys(of_manifest, "manifest.json") | {
        "format": "format 99",
        "number": "manifest.json: its sha256 is not that of its content",
        "renamed": "manifest.json is that of step 7",
    }
    with pytest.raises(CheckpointError, match=f"step-2.*{named.get(how, 'safetensors')}"):
        read_checkpoint(last)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    (over,) = found.passed_over
    assert over.path == last and str(last) in over.why
    (told,) = set_aside(found)
    assert told == f"{over.why}; kept as step-2.unverified, and the run goes on from step 1"
    # Neither a new one of its step nor pruning costs it, and a second one does not take its place.
    damage(write(tmp_path, 2, keep=2), how)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    set_aside(found)
    write(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-2.unverified", "step-2.unverified-2", "step-3"]
    assert newest(tmp_path) == (3, 3.0)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_run_with_damaged_checkpoints_alone_does_not_begin_anew(tmp_path: Path, how: str) -> None:
    for step in (1, 2):
        damage(write(tmp_path, step), how)
    with pytest.raises(CheckpointsUnusable) as caught:
        newest_checkpoint(tmp_path)
    told = str(caught.value)
    for step in (1, 2):
        with pytest.raises(CheckpointError) as alone:
            read_checkpoint(tmp_path / "checkpoints" / f"step-{step}")
        assert f"\n  step-{step}: {alone.value}\n" in told
    assert "put a copy of one in its place, and resume" in told
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize(("failures", "step"), [(READS - 1, 2), (READS, 1)])
def test_storage_that_fails_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, step: int
) -> None:
    write(tmp_path, 1)
    last = write(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "BETWEEN_READS_S", 0.0)
    left = [OSError(errno.EIO, os.strerror(errno.EIO), str(last))] * failures

    def fails(file: Path) -> str:
        if left:
            raise left.pop()
        return sha256_of(file)

    monkeypatch.setattr(checkpoint, "sha256_of", fails)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == step and not left
    assert [over.path for over in found.passed_over] == ([last] if step == 1 else [])


def test_a_manifest_of_an_older_version_has_no_digest(tmp_path: Path) -> None:
    file = write(tmp_path, 2) / "manifest.json"
    content = json.loads(file.read_text())
    assert content.pop("sha256")
    file.write_text(json.dumps(content))
    assert read_checkpoint(file.parent).manifest == content


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints: cannot be read"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_that_cannot_be_kept_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2), "flipped")
    found = newest_checkpoint(tmp_path)
    assert found is not None

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"step-2: cannot be kept as step-2\.unverified"):
        set_aside(found)


def test_what_is_newest_by_manifests_is_told_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert newest_step(tmp_path) == 0
    write(tmp_path, 1)
    damage(write(tmp_path, 2), "file")
    monkeypatch.setattr(checkpoint, "sha256_of", None)
    assert newest_step(tmp_path) == 1
    damage(tmp_path / "checkpoints" / "step-1", "cut")
    with pytest.raises(CheckpointsUnusable, match="step-1"):
        newest_step(tmp_path)


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
    step = 4 if again else 5
    for nth in range(1, 9):
        run = tmp_path / str(nth)
        write(run, 3)
        write(run, 4)
        child = forks().Process(target=_die_at, args=(run, stage, nth, step, behind))
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
    context = forks()
    answer = context.SimpleQueue()
    child = context.Process(target=_write_with_little_room, args=(tmp_path, answer))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert "former checkpoints are as they were" in answer.get()
    assert newest(tmp_path) == (4, 4.0)
    assert names(tmp_path) == ["step-4"]


def test_a_manifest_that_names_no_file_hides_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    empty = write(tmp_path, 2)
    (empty / "manifest.json").write_text('{"format": 1, "step": 2, "files": {}}')
    assert newest(tmp_path) == (1, 1.0)
