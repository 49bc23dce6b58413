"""Rows are a checkpoint when all ranks have written theirs; what one cannot write is told by all."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from learner import checkpoint, sharded_checkpoint
from learner.checkpoint import newest_checkpoint
from learner.ranks import RankFailedForGood, RankLost, Ranks
from learner.sharded_checkpoint import CheckpointRefused, ShardedCheckpointWriter
from policy.sharding import Shards
from tests.dying import dies_before
from tests.ranks_of_processes import each_of, mesh_of

STAGES = ("write_rows", "_sync", "write_text", "rename")
KEEP = 10


def writer_of(run: Path, group: Any, *, asynchronous: bool = True) -> ShardedCheckpointWriter:
    ranks = Ranks(group, group, deadline_s=60, lasting=(CheckpointRefused,))
    shards = Shards(torch.nn.Linear(3, 5, bias=False), mesh_of(group), compute=None)
    return ShardedCheckpointWriter(ranks, shards, run, keep=KEEP, asynchronous=asynchronous)


def state(writer: ShardedCheckpointWriter, value: float) -> dict[str, dict[str, torch.Tensor]]:
    rows = torch.full_like(writer._shards.parameters["weight"], value).detach()
    optimizer = {"step": torch.ones(1), "exp_avg.weight": rows, "exp_avg_sq.weight": rows}
    return {"policy": {"weight": rows}, "optimizer": optimizer, "curriculum": {"streak": torch.ones(2)}}


def write(writer: ShardedCheckpointWriter, step: int, value: float) -> None:
    writer.write(step, state(writer, value), {"epoch": 2})


def newest(run: Path) -> tuple[int, float]:
    found = newest_checkpoint(run)
    assert found is not None
    assert torch.equal(found.state["curriculum"]["streak"], torch.ones(2))
    (value,) = set(found.state["policy"]["weight"].flatten().tolist())
    assert found.state["policy"]["weight"].shape == (5, 3)
    return found.step, value


def alone(run: Path) -> ShardedCheckpointWriter:
    """On the one rank of a world of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    writer = writer_of(run, dist.group.WORLD)
    writer._ranks.order_all = lambda *orders, **deadline: None  # type: ignore[method-assign]
    return writer


def _in_a_world_of_one(run: Path, stage: str, nth: int) -> None:
    """A checkpoint, and of another one of that step end the process before the n-th call of a stage."""
    writer = alone(run)
    write(writer, 4, 4.0)
    writer.finish()
    deadly = dies_before(nth)
    for module in (checkpoint, sharded_checkpoint, Path, checkpoint.shutil):
        if stage in vars(module):
            setattr(module, stage, deadly(getattr(module, stage)))
    write(writer, 4, 77.0)
    writer.finish()


def _again(run: Path) -> None:
    writer = alone(run)
    write(writer, 4, 78.0)
    writer.finish()


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path: Path, stage: str) -> None:
    """And the next write of that step succeeds."""
    context = multiprocessing.get_context("fork")

    def ends(target: Any, *arguments: Any) -> int | None:
        child = context.Process(target=target, args=arguments)
        child.start()
        child.join(timeout=120)
        return child.exitcode

    for nth in range(1, 12):
        run = tmp_path / str(nth)
        end = ends(_in_a_world_of_one, run, stage, nth)
        assert end in (0, 9)
        found = newest(run)
        assert found in {(4, 4.0), (4, 77.0)}
        if end == 0:
            assert found == (4, 77.0)
            break
        if nth == 1:
            assert ends(_again, run) == 0
            assert newest(run) == (4, 78.0)
    assert end == 0, "every call of the stage was reached"


def _one_of_two_fails(folder: Path, rank: int) -> None:
    """First its disk is full, then it is gone."""
    for case in ("full", "gone"):
        writer = writer_of(folder / case, dist.new_group([0, 1]))
        ranks, original = writer._ranks, sharded_checkpoint.write_rows
        if rank == 0:
            write(writer, 1, 1.0)
            writer.finish()
            error: Exception | None = None
            try:
                write(writer, 2, 2.0)
                writer.finish()
            except Exception as caught:
                error = caught
            (folder / f"{case}.txt").write_text(f"{type(error).__name__}: {error}")
            continue
        written = 0

        def fails(*given: Any, case: str = case, original: Any = original) -> None:
            nonlocal written
            written += 1
            if written > 2:
                if case == "gone":
                    os._exit(0)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))
            original(*given)

        sharded_checkpoint.write_rows = fails
        while True:
            order, _ = ranks.next_order(beside_s=0)
            if order.do == "checkpoint":
                writer.begin(order.step, state(writer, float(order.step)))
                continue
            try:
                writer.settle(wait=order.wait)
            except CheckpointRefused as refused:
                (folder / "refused.txt").write_text(str(refused))
                break
        sharded_checkpoint.write_rows = original


def test_what_one_rank_cannot_write_is_told_and_the_former_checkpoint_stays(tmp_path: Path) -> None:
    each_of(2, _one_of_two_fails, tmp_path)
    told = (tmp_path / "full.txt").read_text()
    assert told.startswith(f"{RankFailedForGood.__name__}: rank 1: CheckpointRefused: CheckpointError: ")
    assert "free space in" in told and told.endswith("then go on with --resume")
    assert (tmp_path / "refused.txt").read_text() in told
    gone = (tmp_path / "gone.txt").read_text()
    assert gone.startswith(f"{RankLost.__name__}: rank 0 waited") and "step 2" in gone
    for case in ("full", "gone"):
        assert newest(tmp_path / case) == (1, 1.0)
    assert [one.name for one in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-1"]
