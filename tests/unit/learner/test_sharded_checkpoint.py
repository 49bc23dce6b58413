"""Rows are a checkpoint when all ranks have written theirs; what one cannot write is told by all."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from learner import checkpoint, sharded_checkpoint
from learner.checkpoint import newest_checkpoint
from learner.curriculum import PART
from learner.ranks import Order, RankFailedForGood, RankLost, Ranks
from learner.sharded_checkpoint import CheckpointRefused, ShardedCheckpointWriter, read_rows
from policy.sharding import Shards
from tests.dying import dies_before
from tests.ranks_of_processes import each_of, ends_of, mesh_of

STAGES = {
    0: (
        *("mkdir", "order_all", "write_rows", "save_file", "_sync", "settle", "complete"),
        *("write_text", "rename", "rmtree"),
    ),
    # The last order but one has it settle, the last one ends it: rank 0 completes the checkpoint meanwhile.
    1: ("write_rows", "_sync", "settle", "next_order"),
}
"""What either rank calls while a checkpoint is written."""
KEEP = 2


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


def _goes_on_and_dies(dying: int, stage: str, nth: int, behind: bool, folder: Path, rank: int) -> None:
    """Of two ranks: go on from the newest checkpoint and write another one. Of one more of that step, one
    rank ends its process before the n-th call of a stage; the other one has to notice."""
    writer = writer_of(folder / "run", dist.group.WORLD, asynchronous=behind)
    ranks, (step, value) = writer._ranks, (0, 0.0)
    found = newest_checkpoint(folder / "run")
    if found is not None:
        like = {part: held for part, held in state(writer, -1.0).items() if part != PART}
        rows = read_rows(found, writer._shards, like)["policy"]["weight"]
        step, value = found.step, float(rows[0, 0])
        assert torch.equal(rows, torch.full_like(rows, value))

    def arm() -> None:
        deadly = dies_before(nth)
        for holder in (checkpoint, sharded_checkpoint, shutil, Path, ShardedCheckpointWriter, Ranks):
            if rank == dying and stage in vars(holder):
                setattr(holder, stage, deadly(getattr(holder, stage)))

    try:
        if rank == 0:
            write(writer, step + 1, value + 1)
            writer.finish()
            arm()
            write(writer, step + 1, value + 2)
            writer.check()
            writer.finish()
            ranks.order_all(Order(do="end"))
            return
        whole = 0
        while (order := ranks.next_order(beside_s=0)[0]).do != "end":
            if order.do == "checkpoint":
                # Rank 1 holds rows of what rank 0 writes whole; their values go with the step and the turn.
                writer.begin(order.step, state(writer, value + 1 + whole))
            elif writer.settle(wait=order.wait) is not None:
                whole += 1
                if whole == 1:
                    arm()
    except RankLost:
        assert rank != dying
    finally:
        writer.close()


@pytest.mark.parametrize("dying", [0, 1])
def test_a_kill_of_either_rank_at_any_moment_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, dying: int
) -> None:
    """Each pair of ranks goes on from what the death before it has left. Every other one writes behind the
    training."""
    behind, known = False, (0, 0.0)
    for stage in STAGES[dying]:
        for nth in range(1, 20):
            behind = not behind
            ends = ends_of(2, partial(_goes_on_and_dies, dying, stage, nth, behind), tmp_path)
            where = f"{stage}, call {nth}"
            assert ends in ([0, 0], [9, 0] if dying == 0 else [0, 9]), where
            step, value = known
            known = newest(tmp_path / "run")
            assert known in {(step + 1, value + 1), (step + 1, value + 2)}, where
            if ends == [0, 0]:
                assert known == (step + 1, value + 2), where
                break
        assert nth > 1 and ends == [0, 0], f"{stage}: every call was reached"


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
