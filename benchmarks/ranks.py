"""The same updates on one rank and on several: what each rank computes, what they wait, how far they differ.

The quickstart's model and objective, on processes of this machine over gloo, each with one thread; groups are
random. Ranks that share cores do not become faster: CPU seconds say what a rank has to compute, wall seconds
what this machine makes of it. It says nothing of GPUs.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.follower import begin_together, follow
from learner.ranks import Order, Ranks
from learner.update import TrainingGroup, Updater
from policy import load_policy
from services.config import Config
from services.config_file import load_config
from services.heartbeat import Pulse

COUNTS = (1, 2, 4)
UPDATES = 6
"""The first one is not timed."""
DEADLINE_S = 600.0
PROMPT = 'a sign that says "K7QX"'


def run_ranks_bench(
    screen: Console | None = None,
    *,
    counts: tuple[int, ...] = COUNTS,
    updates: int = UPDATES,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Updates on one, two and four ranks.

    Args:
        counts: numbers of ranks; the first one is what the others are compared with.
        updates: the first of which is not timed.
        overrides: of the quickstart recipe.

    Returns:
        `ranks`: by number, `update_s` (median wall seconds of an update), `cpu_s` (CPU seconds of an update
        on the busiest rank), `waited_s` (of rank 0: for others, and adding gradients), and `difference`: the
        largest difference of a weight to one rank's, in units of the largest change of a weight.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            config = _config(count, overrides)
            _run(config, Path(folder), updates)
            ranks = [json.loads((Path(folder) / f"{count}-{rank}.json").read_text()) for rank in range(count)]
            found[str(count)] = {
                "update_s": statistics.median(ranks[0]["update_s"]),
                "cpu_s": max(statistics.median(one["cpu_s"]) for one in ranks),
                "waited_s": statistics.median(ranks[0]["waited_s"]),
                "difference": _difference(Path(folder), count, counts[0]),
            }
    result = {"benchmark": "ranks", "updates": updates - 1, "groups": config.learner.groups_per_step}
    if screen is not None:
        screen.print(_table(found))
    return result | {"ranks": found}


def _config(count: int, overrides: tuple[str, ...]) -> Config:
    return load_config("quickstart", [f"learner.ranks={count}", "learner.max_steps=1000", *overrides])


def _run(config: Config, folder: Path, updates: int) -> None:
    spawning, count = multiprocessing.get_context("spawn"), config.learner.ranks
    processes = [
        spawning.Process(target=_rank, args=(rank, config, folder, updates)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
        if process.exitcode != 0:
            raise RuntimeError(
                f"a rank of {count} ended with {process.exitcode} (None: not in {DEADLINE_S:g} s)"
            )


def _rank(rank: int, config: Config, folder: Path, updates: int) -> None:
    torch.set_num_threads(1)
    count = config.learner.ranks
    policy = load_policy(config.model, text_encoders=rank == 0, vae=False, base=config.objective.needs_base)
    ranks = None
    if count > 1:
        store = f"file://{folder}/{count}.store"
        deadline = timedelta(seconds=DEADLINE_S)
        dist.init_process_group("gloo", store, rank=rank, world_size=count, timeout=deadline)
        ranks = Ranks(dist.group.WORLD, dist.group.WORLD, deadline_s=DEADLINE_S)
    updater = Updater(policy, config, ranks)
    if ranks is not None:
        begin_together(ranks, updater)
    times: dict[str, list[float]] = {"update_s": [], "cpu_s": [], "waited_s": []}
    if rank == 0:
        condition = policy.encode(PROMPT)
        save_file(policy.tensors(), folder / f"{count}-before.safetensors")
        for step in range(updates):
            groups = _groups(config, step, policy.latent_shape(), condition)
            wall, cpu = time.perf_counter(), time.process_time()
            metrics = updater.step(groups, step)
            times["update_s"].append(time.perf_counter() - wall)
            times["cpu_s"].append(time.process_time() - cpu)
            times["waited_s"].append(metrics.seconds.get("ranks", 0.0))
        if ranks is not None:
            ranks.order_all(Order(do="end"))
        save_file(policy.tensors(), folder / f"{count}-after.safetensors")
    elif ranks is not None:
        follow(ranks, _Timed(updater, times["cpu_s"]), Pulse("", lambda beat: None), beside_s=0, report=print)
    (folder / f"{count}-{rank}.json").write_text(
        json.dumps({name: values[1:] for name, values in times.items()})
    )


class _Timed(Updater):
    """An updater whose every update is timed."""

    def __init__(self, updater: Updater, cpu_s: list[float]) -> None:
        self.__dict__ = updater.__dict__
        self._cpu_s = cpu_s

    def follow(self, share: Any) -> None:
        start = time.process_time()
        super().follow(share)
        self._cpu_s.append(time.process_time() - start)


def _groups(
    config: Config, step: int, shape: tuple[int, int, int], condition: dict[str, Tensor]
) -> list[TrainingGroup]:
    made, size = torch.Generator().manual_seed(step), config.rollout.group_size
    return [
        TrainingGroup(
            ordinal=step * config.learner.groups_per_step + place,
            latents=torch.randn((size, *shape), generator=made),
            rewards={reward.name: torch.rand(size, generator=made).tolist() for reward in config.rewards},
            condition=condition,
        )
        for place in range(config.learner.groups_per_step)
    ]


def _difference(folder: Path, count: int, single: int) -> float:
    before, ours, theirs = (
        load_file(folder / name)
        for name in (
            f"{single}-before.safetensors",
            f"{count}-after.safetensors",
            f"{single}-after.safetensors",
        )
    )
    moved = max(float((theirs[name] - before[name]).abs().max()) for name in before)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in before) / moved


def _table(found: dict[str, Any]) -> Table:
    table = Table(title="the same updates on several ranks", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("ranks", "CPU s a rank", "wall s", "of it for other ranks", "differs from one rank by"):
        table.add_column(heading, justify="right")
    for count, one in found.items():
        table.add_row(
            count,
            f"{one['cpu_s']:.2f}",
            f"{one['update_s']:.2f}",
            f"{one['waited_s']:.2f}",
            f"{one['difference']:.1e}",
        )
    return table
