"""Many thousand groups through the real queue, worker loops and learner loop, with nothing in the place of
model and rewards, to see whether anything grows: memory of every process, of the queue server, of its data.

Each part is a process of its own, as in a run: two workers, the learner, and the driver's part (it moves
metrics from the queue into a file). Numbers of groups, not hours, make the difference: this is a weekend's
worth of them in minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.overlap import TimedSampler, TimedScorer, TimedTrainer
from learner.loop import LearnerLoop, Start
from rollout_workers.loop import RolloutLoop, worker_pulse
from services.config import Config
from services.config_file import load_config
from services.embedded import EmbeddedValkey
from services.group_queue import GroupQueue, connect
from services.heartbeat import Pulse
from services.metrics import row_of
from services.prompts import group_task, prompt_source
from services.telemetry import Telemetry

GROUPS: Final = 50_000
GROUPS_PER_STEP: Final = 8
WORKERS: Final = 2
TARGET: Final = 0.05
"""Growth from a tenth of the run to its end."""
RUN: Final = "soak"
BEHIND: Final = 0.1
DEADLINE_S: Final = 300.0

Place = tuple[str, str, Config]


def run_soak_bench(screen: Console | None = None, *, groups: int = GROUPS) -> dict[str, Any]:
    """Memory at a tenth of the run and at its end.

    Args:
        groups: trained in all, a multiple of 8.

    Returns:
        `parts`: name -> `early` and `late` (bytes; the mean over a tenth of the run), `growth`; `seconds`,
        `groups_s`, `target`, `met`.

    Raises:
        RuntimeError: not all groups were trained.
    """
    steps = groups // GROUPS_PER_STEP
    config = load_config(
        "quickstart",
        [
            *("rollout.group_size=4", "learner.micro_batch=4", "rewards=[{name: ocr, app: ocr}]"),
            f"learner.groups_per_step={GROUPS_PER_STEP}",
            f"learner.max_steps={steps}",
        ],
    )
    spawn = multiprocessing.get_context("spawn")
    seen: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder) / "queue") as server:
        place = (server.url, server.password, config)
        queue, client = _open(place), connect(server.url, server.password)
        queue.set_state("running")
        parts = {"learner-0": spawn.Process(target=_learn, args=(place,))}
        parts |= {
            f"rollout-{index}": spawn.Process(target=_work, args=(place, index)) for index in range(WORKERS)
        }
        for process in parts.values():
            process.start()
        began = time.monotonic()
        watched = {name: psutil.Process(part.pid) for name, part in parts.items()}
        watched |= {"driver": psutil.Process(os.getpid()), "queue server": psutil.Process(server.pid)}
        with Telemetry(Path(folder), tensorboard=False) as telemetry:
            last, give_up = queue.last_written_metrics(), time.monotonic() + DEADLINE_S
            while parts["learner-0"].is_alive():
                done = queue.status().trained / groups
                for name, looked_at in watched.items():
                    seen.setdefault(name, []).append((done, looked_at.memory_info().rss))
                used = int(client.info("memory")["used_memory"])
                seen.setdefault("data in the queue", []).append((done, used))
                while rows := queue.read_metrics(last):
                    give_up = time.monotonic() + DEADLINE_S
                    for _, row in rows:
                        telemetry.write(row_of(row))
                    last = rows[-1][0]
                    queue.metrics_written(last)
                if time.monotonic() > give_up:
                    raise RuntimeError(f"no update for {DEADLINE_S:g} s at {done:.0%} of the run")
                time.sleep(0.05)
        seconds = time.monotonic() - began
        code, trained = parts["learner-0"].exitcode, queue.status().trained
        queue.set_state("done")
        for process in parts.values():
            process.join(DEADLINE_S)
    if code != 0 or trained != steps * GROUPS_PER_STEP:
        raise RuntimeError(f"the learner ended with {code} and {trained} of {groups} groups trained")
    found = {name: _growth(points) for name, points in seen.items()}
    result = {
        "benchmark": "soak",
        "groups": groups,
        "seconds": seconds,
        "groups_s": groups / seconds,
        "parts": found,
        "target": TARGET,
        "met": all(part["growth"] <= TARGET for part in found.values()),
    }
    if screen is not None:
        screen.print(_table(result))
    return result


def _growth(points: Sequence[tuple[float, int]]) -> dict[str, float]:
    early, late = ([size for done, size in points if start <= done <= start + 0.1] for start in (BEHIND, 0.9))
    means = [sum(sizes) / len(sizes) for sizes in (early, late)]
    return {"early": means[0], "late": means[1], "growth": means[1] / means[0] - 1}


def _open(place: Place) -> GroupQueue:
    url, password, config = place
    return GroupQueue(connect(url, password), RUN, config.queue)


def _learn(place: Place) -> None:
    torch.set_num_threads(1)
    queue = _open(place)
    with Pulse("learner-0", lambda beat: queue.beat(beat, 10.0)) as pulse:
        LearnerLoop(place[2], queue, TimedTrainer(0.0), pulse).run(Start())


def _work(place: Place, index: int) -> None:
    torch.set_num_threads(1)
    queue, config, name = _open(place), place[2], f"rollout-{index}"
    prompts = prompt_source(config)
    with worker_pulse(name, queue, config) as pulse:
        RolloutLoop(
            *(name, queue, TimedSampler(0.0), TimedScorer(0.0)),
            lambda lease: group_task(config, prompts, RUN, lease.ordinal, lease.attempt, lease.version),
            pulse,
        ).run()


def _table(result: dict[str, Any]) -> Table:
    told = "" if result["met"] else "  MISSED"
    title = (
        f"{result['groups']} groups in {result['seconds']:.0f} s ({result['groups_s']:.0f}/s); "
        f"growth at most {result['target']:.0%}{told}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for heading in ("MB at a tenth", "MB at the end", "growth"):
        table.add_column(heading, justify="right")
    for name, part in result["parts"].items():
        table.add_row(
            name, f"{part['early'] / 1e6:.1f}", f"{part['late'] / 1e6:.1f}", f"{part['growth']:+.1%}"
        )
    return table
