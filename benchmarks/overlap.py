"""How much of rollout and learning overlaps: the real queue, worker loops and learner loop, with the model
work replaced by waits of a measured length (so that two cores can show what eight GPUs would do).

At `max_staleness: 0` a step takes about rollout + scores + learner; from 1 on it should take the longer of
rollout and learner. Nothing can be faster than that, nor than (rollout + last scores + learner) /
(max_staleness + 1): an ordinal is issued at most that many steps before it is trained.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.queue import announcement
from learner.loop import LearnerLoop, Start
from rollout_workers.loop import RolloutLoop, SampledGroup
from rollout_workers.scoring import GroupScores
from services.codec import Group
from services.config import Config
from services.config_file import load_config
from services.embedded import EmbeddedValkey
from services.group_queue import Frontier, GroupQueue, connect
from services.heartbeat import Pulse
from services.messages import GroupTask, PolicyVersion, Prompt, WeightsAnnouncement
from services.prompts import group_task, prompt_source

WARM_UP_STEPS = 2


class TimedSampler:
    """Waits as long as a group takes to sample."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def install(self, announcement: WeightsAnnouncement) -> None:
        pass

    def sample(self, task: GroupTask) -> SampledGroup:
        time.sleep(self._seconds)
        size = len(task.seeds)
        return SampledGroup(
            {"latents": torch.zeros(size, 4, 8, 16), "condition.prompt_embeds": torch.zeros(9, 96)},
            np.zeros((size, 32, 64, 3), dtype=np.uint8),
        )


class TimedScorer:
    """Waits as long as a group takes to score."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[Prompt], *, ordinal: int | None = None
    ) -> GroupScores:
        time.sleep(self._seconds)
        return GroupScores(rewards={"ocr": tuple(float(place % 2) for place in range(len(images)))})


class TimedTrainer:
    """Waits as long as an update takes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def update(self, groups: Sequence[Group], step: int) -> dict[str, Any]:
        time.sleep(self._seconds)
        return {"reward_mean": 0.5, "reward_std": 0.5}

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        return announcement(version).model_copy(update={"kind": kind})

    def checkpoint(self, version: PolicyVersion, frontier: Frontier) -> None:
        pass

    def finish(self) -> None:
        pass


def run_overlap_bench(
    screen: Console | None = None,
    *,
    sample_s: float = 0.5,
    reward_s: float = 0.1,
    learner_s: float = 1.0,
    workers: int = 2,
    groups_per_step: int = 4,
    steps: int = 10,
) -> dict[str, Any]:
    """Median step seconds at staleness 0 and 1.

    Args:
        sample_s: a group's sampling.
        reward_s: a group's scoring, beside the next group's sampling.
        learner_s: an update.

    Returns:
        `rollout_s` (sampling a step's groups), `reward_s`, `learner_s`, and for each staleness `step_s`,
        `of_sum` (against all three in a row) and `of_max` (against the longer of rollout and learner).
    """
    turns = -(-groups_per_step // workers)
    rollout_s = turns * sample_s
    result: dict[str, Any] = {
        "benchmark": "overlap",
        "workers": workers,
        "groups_per_step": groups_per_step,
        "steps": steps,
        "rollout_s": rollout_s,
        "reward_s": reward_s,
        "learner_s": learner_s,
        "staleness": {},
    }
    for staleness in (0, 1):
        seconds = _steps(sample_s, reward_s, learner_s, workers, groups_per_step, steps, staleness)
        step_s = statistics.median(seconds[WARM_UP_STEPS:])
        result["staleness"][str(staleness)] = {
            "step_s": step_s,
            # The last group's scores cannot be hidden when the step must wait for them.
            "of_sum": step_s / (rollout_s + reward_s + learner_s),
            "of_max": step_s / max(rollout_s, learner_s),
        }
    if screen is not None:
        screen.print(_table(result))
    return result


def _steps(
    sample_s: float, reward_s: float, learner_s: float, workers: int, groups: int, steps: int, staleness: int
) -> list[float]:
    config = load_config(
        "quickstart",
        [
            f"queue.max_staleness={staleness}",
            f"learner.groups_per_step={groups}",
            f"learner.max_steps={steps + WARM_UP_STEPS}",
        ],
    )
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:

        def open_queue() -> GroupQueue:
            return GroupQueue(connect(server.url, server.password), "overlap", config.queue)

        queue = open_queue()
        queue.set_state("running")
        threads = [
            threading.Thread(
                target=_work, args=(config, open_queue(), f"rollout-{index}", sample_s, reward_s), daemon=True
            )
            for index in range(workers)
        ]
        seconds: list[float] = []
        pulse = Pulse("learner-0", lambda beat: queue.beat(beat, 10.0))
        loop = LearnerLoop(
            config, queue, TimedTrainer(learner_s), pulse, on_step=lambda row: seconds.append(row["seconds"])
        )
        for thread in threads:
            thread.start()
        loop.run(Start())
        queue.set_state("done")
        for thread in threads:
            thread.join(timeout=30)
    return seconds


def _work(config: Config, queue: GroupQueue, name: str, sample_s: float, reward_s: float) -> None:
    prompts = prompt_source(config)
    pulse = Pulse(name, lambda beat: queue.beat(beat, 10.0), lambda ordinal: queue.renew(name, ordinal))
    RolloutLoop(
        name,
        queue,
        TimedSampler(sample_s),
        TimedScorer(reward_s),
        lambda lease: group_task(config, prompts, "overlap", lease.ordinal, lease.attempt, lease.version),
        pulse,
    ).run()


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"a step: {result['rollout_s']:.2f} s of rollout, {result['reward_s']:.2f} s for the last "
        f"scores, {result['learner_s']:.2f} s of learner",
        title_justify="left",
    )
    for heading in ("max_staleness", "step s", "/ (rollout + scores + learner)", "/ max(rollout, learner)"):
        table.add_column(heading, justify="right")
    for staleness, row in result["staleness"].items():
        table.add_row(staleness, f"{row['step_s']:.3f}", f"{row['of_sum']:.2f}", f"{row['of_max']:.2f}")
    return table
