"""Whether a plan comes true: the split of `dgpo plan`, run as a simulated cluster.

The queue server, the worker loops and the learner's loop are the real ones. Sampling, scoring, training, and
the install and publish of weights are waits of the modelled time, all divided by one factor, so that a
cluster of hundreds of GPUs fits on two cores: waits cost no CPU. Replicas are slots that workers wait for.
Groups are small, so that the queue's bytes are not in it: reading them is part of the learner's wait. What is
checked is how parts wait for each other, not how long a part takes; that is counted and assumed
(services/planning).

Workers are threads of a few processes of their own, whose own time is in the figure: a factor is chosen that
leaves an update at least `SECONDS_A_GROUP` for each of its groups.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.overlap import TimedSampler, TimedTrainer
from learner.loop import LearnerLoop, Start
from rollout_workers.loop import RolloutLoop, SampledGroup
from rollout_workers.scoring import GroupScores
from services.config import Config
from services.config_file import load_config
from services.embedded import EmbeddedValkey
from services.group_queue import GroupQueue, connect
from services.heartbeat import Pulse
from services.messages import GroupTask, PolicyVersion, Prompt, WeightsAnnouncement
from services.planning.local import architecture
from services.planning.plan import Costs, Plan, costs_of, make_plan
from services.planning.traffic import Machine
from services.prompts import group_task, prompt_source

RECIPE: Final = "sd35-medium-geneval-8gpu"
SIZES: Final = (8, 64, 512)
TARGET: Final = 0.15
SECONDS_A_GROUP: Final = 0.02
"""Of an update, simulated: on two cores a group costs the loops and the server a few milliseconds."""
LEAST_SECONDS: Final = 1.0
JITTER: Final = 0.05
"""A group takes so much more or less to sample."""
WARM_UP_UPDATES: Final = 2
LEAST_UPDATES: Final = 3
RUN_S: Final = 60.0
"""Of one simulation: large clusters are measured for fewer updates."""
WORKERS_A_PROCESS: Final = 64
DEADLINE_S: Final = 180.0
RUN: Final = "plan"

Place = tuple[str, str, Config]


@dataclass(frozen=True)
class Waits:
    """Of a simulated worker, in seconds."""

    sample: float
    install: float
    scores: tuple[float, ...]
    """Of each reward."""


class WaitingSampler(TimedSampler):
    """Waits as long as a group takes, and as long as an install."""

    def __init__(self, waits: Waits, name: str) -> None:
        super().__init__(waits.sample)
        self._waits, self._random = waits, random.Random(name)

    def install(self, announcement: WeightsAnnouncement) -> None:
        time.sleep(self._waits.install)

    def sample(self, task: GroupTask) -> SampledGroup:
        self._seconds = self._waits.sample * self._random.uniform(1 - JITTER, 1 + JITTER)
        return super().sample(task)


class SlotScorer:
    """Waits for a replica of each reward, and as long as that takes to score a group."""

    def __init__(self, waits: Waits, slots: Sequence[Any]) -> None:
        self._waits, self._slots = waits, slots

    def score(
        self, images: NDArray[Any], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores:
        # Rewards are asked at the same time: the slowest is waited for, and stands for all.
        slowest = max(range(len(self._slots)), key=lambda place: self._waits.scores[place], default=None)
        if slowest is not None:
            with self._slots[slowest]:
                time.sleep(self._waits.scores[slowest])
        return GroupScores(rewards={"ocr": tuple(float(place % 2) for place in range(len(images)))})


class PublishingTrainer(TimedTrainer):
    """Waits for an update and for each publish."""

    def __init__(self, update: float, publish: float) -> None:
        super().__init__(update)
        self._publish = publish

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        if kind == "policy":
            time.sleep(self._publish)
        return super().publish(version, kind=kind)


def run_plan_bench(
    screen: Console | None = None,
    *,
    gpus: Sequence[int] = SIZES,
    recipe: str = RECIPE,
    overrides: Sequence[str] = (),
    staleness: Sequence[int] = (1, 0),
    updates: int = 6,
    seconds_a_group: float = SECONDS_A_GROUP,
) -> dict[str, Any]:
    """Predicted and simulated seconds of an update, for each number of GPUs and `queue.max_staleness`.

    Args:
        recipe: its groups of an update become as many as there are GPUs, where it has fewer.
        updates: measured at most, behind `WARM_UP_UPDATES`.

    Returns:
        `runs`, one a size and staleness: `gpus`, `staleness`, `groups`, `workers`, `ranks`, `bottleneck`,
        `factor`, `predicted_s` and `simulated_s` (of the cluster; the median), `error`; `target`, `met`.
    """
    base = load_config(recipe, overrides)
    # No image goes to a reward that is simulated.
    costs = costs_of(base, architecture(base.model), Machine(proxy_bytes_s=math.inf))
    runs = []
    for count in gpus:
        for allowed in staleness:
            groups = max(count, base.learner.groups_per_step)
            said = [*overrides, f"learner.groups_per_step={groups}", f"queue.max_staleness={allowed}"]
            scaled = costs_of(load_config(recipe, said), costs.model, costs.machine, counted=costs.counted)
            runs.append(_compare(make_plan(scaled, count), updates, seconds_a_group))
    result = {
        "benchmark": "plan",
        "recipe": recipe,
        "runs": runs,
        "target": TARGET,
        "met": all(abs(run["error"]) <= TARGET for run in runs),
    }
    if screen is not None:
        screen.print(_table(result))
    return result


def _compare(plan: Plan, updates: int, seconds_a_group: float) -> dict[str, Any]:
    shape = plan.costs.shape
    simulated = max(LEAST_SECONDS, seconds_a_group * shape.groups)
    factor = plan.step.seconds / simulated
    fit = max(LEAST_UPDATES, int(RUN_S / simulated) - WARM_UP_UPDATES)
    seconds = simulate(plan, min(updates, fit), factor) * factor
    return {
        "gpus": plan.gpus,
        "staleness": shape.staleness,
        "groups": shape.groups,
        "workers": plan.split.workers,
        "ranks": plan.split.ranks,
        "bottleneck": plan.step.bottleneck,
        "factor": factor,
        "predicted_s": plan.step.seconds,
        "simulated_s": seconds,
        "error": seconds / plan.step.seconds - 1,
    }


def simulate(plan: Plan, updates: int, factor: float) -> float:
    """Median seconds of an update of the simulated cluster, whose waits are divided by a factor."""
    costs, split = plan.costs, plan.split
    if split.colocated:
        raise ValueError("parts that take turns on one GPU are not simulated: give 2 GPUs or more")
    times, waits = costs.times(split), _waits(costs, plan, factor)
    config = load_config(
        "quickstart",
        [
            *("rollout.group_size=4", "learner.micro_batch=4", "rewards=[{name: ocr, app: ocr}]"),
            f"queue.max_staleness={costs.shape.staleness}",
            f"queue.max_groups={2 * costs.shape.window}",
            f"learner.groups_per_step={costs.shape.groups}",
            f"learner.max_steps={updates + WARM_UP_UPDATES}",
            f"queue.lease_s={10 * DEADLINE_S}",
            f"queue.take_deadline_s={DEADLINE_S}",
        ],
    )
    update = plan.step.parts["learner"] - times.publish
    trainer = PublishingTrainer(update / factor, times.publish / factor)
    spawn = multiprocessing.get_context("spawn")
    slots = [spawn.Semaphore(split.replicas[name]) for name in times.scores]
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:
        place = (server.url, server.password, config)
        parts = -(-split.workers // WORKERS_A_PROCESS)
        begun = spawn.Barrier(parts + 1)
        processes = [
            spawn.Process(
                target=_simulate, args=(place, range(part, split.workers, parts), waits, slots, begun)
            )
            for part in range(parts)
        ]
        for process in processes:
            process.start()
        queue = _open(place)
        queue.set_state("running")
        begun.wait(DEADLINE_S)
        pulse = Pulse("learner-0", lambda beat: queue.beat(beat, 10.0))
        LearnerLoop(config, queue, trainer, pulse, on_step=lambda row: seconds.append(row["seconds"])).run(
            Start()
        )
        queue.set_state("done")
        for process in processes:
            process.join(DEADLINE_S)
    return statistics.median(seconds[WARM_UP_UPDATES:])


def _waits(costs: Costs, plan: Plan, factor: float) -> Waits:
    """A worker's GPU is the reward's too, where it shares it."""
    times, alone = costs.times(plan.split), plan.split.reward_gpus
    shared = sum(costs.group_score_s(one) for one in costs.rewards if one.on_gpu and not alone)
    return Waits(
        sample=(times.sample + shared) / factor,
        install=times.install / factor,
        scores=tuple(seconds / factor for seconds in times.scores.values()),
    )


def _open(place: Place) -> GroupQueue:
    url, password, config = place
    return GroupQueue(connect(url, password, deadline_s=DEADLINE_S), RUN, config.queue)


def _simulate(place: Place, share: Sequence[int], waits: Waits, slots: Sequence[Any], begun: Any) -> None:
    """Some of the workers, each a thread with a connection of its own."""
    torch.set_num_threads(1)
    config = place[2]
    prompts = prompt_source(config)

    def work(index: int) -> None:
        name, queue = f"rollout-{index}", _open(place)
        RolloutLoop(
            *(name, queue, WaitingSampler(waits, name), SlotScorer(waits, slots)),
            lambda lease: group_task(config, prompts, RUN, lease.ordinal, lease.attempt, lease.version),
            Pulse(name, lambda beat: queue.beat(beat, 10.0)),
        ).run()

    threads = [threading.Thread(target=work, args=(index,)) for index in share]
    begun.wait(DEADLINE_S)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _table(result: Mapping[str, Any]) -> Table:
    told = "" if result["met"] else "  MISSED"
    table = Table(
        title=f"{result['recipe']}, seconds an update: within {result['target']:.0%}{told}",
        title_justify="left",
    )
    for heading in ("GPUs", "stale", "groups", "split", "held up by", "planned", "came", "off"):
        table.add_column(heading, justify="right")
    for run in result["runs"]:
        table.add_row(
            *(str(run["gpus"]), str(run["staleness"]), str(run["groups"])),
            f"{run['workers']}+{run['ranks']}",
            run["bottleneck"],
            f"{run['predicted_s']:.2f}",
            f"{run['simulated_s']:.2f}",
            f"{run['error']:+.1%}",
        )
    return table
