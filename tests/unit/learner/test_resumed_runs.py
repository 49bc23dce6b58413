"""Ten updates of a real model are five, a death while a checkpoint is written, a resume and five more.

Bit for bit: what enters an update follows from its step, as in a run with `max_staleness: 0`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded_runs import GROUPS, led, train, trainer_of, version
from torch import Tensor

from learner.checkpoint import read_checkpoint
from learner.ranks import RankLost
from services.group_queue import Frontier
from tests.dying import dies_before
from tests.ranks_of_processes import each_of

LORA = ("model.train=lora", "model.lora.rank=4", "learner.compare_every=1")


def _trains(saved: str, steps: range, at: int, dying: bool, folder: Path, rank: int) -> None:
    """From the newest checkpoint on, with one behind an update; ahead of its manifest rank 0 may die."""
    several = dist.get_world_size() > 1
    # Behind the training, where there are several.
    settings = (*LORA, f"checkpoint.asynchronous={str(several).lower()}", "checkpoint.keep=9")
    trainer = trainer_of(folder / "run", dist.group.WORLD if several else None, *settings)
    losses: list[float] = []

    def lead() -> None:
        for step in steps:
            losses.extend(float(loss or 0.0) for loss in train(trainer, range(step, step + 1)))
            if step + 1 == at:
                if dying:
                    Path.write_text = dies_before(1)(Path.write_text)  # type: ignore[method-assign]
                trainer.checkpoint(version(at), Frontier(below=at * GROUPS))
        trainer.finish()

    try:
        start = led(trainer, lead)
    except RankLost:
        assert rank and dying
        return
    # The others have rank 0's state and know no step.
    assert rank or start.step == steps.start
    held = trainer.updater.state()
    state = {f"{part}.{name}": tensor for part, tensors in held.items() for name, tensor in tensors.items()}
    torch.save((losses, state), folder / f"{saved}-{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of ranks."""
    folders = {count: tmp_path_factory.mktemp(f"on-{count}") for count in (1, 2)}
    for count, folder in folders.items():
        each_of(count, partial(_trains, "ten", range(10), 5, False), folder)
        each_of(count, partial(_trains, "dying", range(5, 6), 6, True), folder, dies=0)
        assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == [
            ".step-6.partial",
            "step-5",
        ]
        each_of(count, partial(_trains, "more", range(5, 10), 10, False), folder)
    return folders


def of(folder: Path, name: str, rank: int = 0) -> tuple[list[float], dict[str, Tensor]]:
    found: tuple[list[float], dict[str, Tensor]] = torch.load(folder / f"{name}-{rank}.pt")
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_ten_updates_are_five_a_death_a_resume_and_five_more(runs: dict[int, Path], count: int) -> None:
    losses, state = of(runs[count], "ten")
    for rank in range(count):
        again, resumed = of(runs[count], "more", rank)
        assert again == (losses[5:] if rank == 0 else [])
        assert resumed.keys() == state.keys()
        assert all(torch.equal(resumed[name], tensor) for name, tensor in state.items())
    # What it wrote at the end is that too.
    stored = read_checkpoint(runs[count] / "run" / "checkpoints" / "step-10").state
    assert all(torch.equal(stored["policy"][name], state[f"policy.{name}"]) for name in stored["policy"])


def test_lora_on_two_ranks_trains_what_one_rank_trains(runs: dict[int, Path]) -> None:
    (losses, _), (shared, _) = of(runs[1], "ten"), of(runs[2], "ten")
    assert shared == pytest.approx(losses, rel=1e-6, abs=1e-8)
    assert len(set(losses)) == 10
    after_five = [
        read_checkpoint(runs[count] / "run" / "checkpoints" / "step-5").state["policy"] for count in (1, 2)
    ]
    assert after_five[0].keys() == after_five[1].keys()
    # All but those behind which nothing comes: the last block's of the prompt.
    moved = [tensor.any().item() for name, tensor in after_five[0].items() if "lora_B" in name]
    assert len(moved) > 20 and moved.count(False) <= 4
    for name, tensor in after_five[0].items():
        torch.testing.assert_close(after_five[1][name], tensor, rtol=1e-4, atol=5e-7)
