"""Ranks that are processes: what divides weights among them knows no threads."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from learner.ranks import Ranks
from tests.forks import forks

DEADLINE_S = 60.0
STORE = "world.store"


def ranks_of(group: Any) -> Ranks:
    return Ranks(group, group, deadline_s=DEADLINE_S)


def mesh_of(group: Any) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


def each_of(
    count: int,
    body: Callable[[Path, int], None],
    folder: Path,
    *,
    dies: int | None = None,
    timeout_s: float = 240,
) -> None:
    """Run `body(folder, rank)` on as many processes, which are the world of torch.distributed.

    Args:
        dies: the rank that ends without a word (tests/dying.py).

    Raises:
        AssertionError: one of them failed, with its words, or ended otherwise than it should.
    """
    ends = _ends(count, body, folder, timeout_s)
    expected = [9 if rank == dies else 0 for rank in range(count)]
    assert ends == expected, f"ranks ended with {ends}:\n{_words(folder)}"


def ends_of(count: int, body: Callable[[Path, int], None], folder: Path) -> list[int]:
    """The same where a rank may die or not.

    Returns:
        How each has ended.

    Raises:
        AssertionError: one of them raised, or was still there.
    """
    ends = _ends(count, body, folder, 2 * DEADLINE_S)
    assert None not in ends and 1 not in ends, f"ranks ended with {ends}:\n{_words(folder)}"
    return [end for end in ends if end is not None]


def _ends(count: int, body: Any, folder: Path, timeout_s: float) -> list[int | None]:
    """None of a process that had to be killed."""
    (folder / STORE).unlink(missing_ok=True)
    context = forks()
    processes = [context.Process(target=_run, args=(body, folder, rank, count)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
    ends = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return ends


def _words(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("failed-*")))


def _run(body: Callable[[Path, int], None], folder: Path, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/{STORE}"
    dist.init_process_group("gloo", store, rank=rank, world_size=count, timeout=timedelta(seconds=DEADLINE_S))
    try:
        body(folder, rank)
    except BaseException:
        (folder / f"failed-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
