"""The rollout worker as a Ray actor: binds the loop to the real policy, reward servers and queue."""

from __future__ import annotations

import json
import logging
from typing import Any, Literal

import torch

from policy.parking import Parking
from rollout_workers.loop import KeepImages, RolloutLoop, SampledGroup, worker_pulse
from rollout_workers.policy_sampler import PolicySampler
from rollout_workers.scoring import GroupScores, RewardServers
from services.card import card_of
from services.context import RunContext
from services.group_queue import Lease
from services.images import write_strip
from services.logs import configure_logging
from services.messages import GroupTask
from services.process_title import show_title
from services.prompts import group_task, prompt_source
from services.ray_metrics import RewardMetrics
from services.transports.choice import open_transport

logger = logging.getLogger(__name__)


class RolloutWorker:
    """One rollout worker.

    Args:
        context: RunContext as JSON.
        index: of the worker in the run.
        store: handle of the PolicyStore actor.
    """

    def __init__(self, context: str, index: int, store: Any) -> None:
        self._context = RunContext.model_validate_json(context)
        self._index, self._name = index, f"rollout-{index}"
        configure_logging(self._name, self._context.directory, run=self._context.run)
        self._store = store
        torch.set_num_threads(self._context.config.rollout.threads)

    def run(self) -> Literal["ended", "dismissed"]:
        """Work until the run ends, or this worker is one too many."""
        context, config = self._context, self._context.config
        queue = context.open_queue("worker")
        with worker_pulse(self._name, queue, config, show=show_title) as pulse:
            card = card_of(config, queue, pulse)
            with card.turn():
                pulse.enter("loading the model")
                transport = open_transport(config, context.directory, self._store)
                sampler = PolicySampler(config, context.directory, transport)
                card.state = Parking(sampler.policy.held, sampler.policy.device)
            scorer = RewardServers(config.rewards, context.rewards, RewardMetrics(context.run).asked)
            prompts = prompt_source(config)

            def task_of(lease: Lease) -> GroupTask:
                place = queue.place_of(lease) if config.prompts.curriculum.after else lease.ordinal
                return group_task(
                    *(config, prompts, context.run, lease.ordinal, lease.attempt, lease.version), place=place
                )

            loop = RolloutLoop(
                *(self._name, queue, sampler, scorer, task_of, pulse),
                keep_images=sample_keeper(context),
                card=card,
                unwanted=lambda: self._index >= (queue.wanted_workers() or config.rollout.workers),
            )
            logger.info("ready to sample")
            try:
                loop.run()
                return "dismissed" if loop.dismissed else "ended"
            except Exception:
                logger.exception("%s failed", self._name)
                raise
            finally:
                scorer.close()


def sample_keeper(context: RunContext) -> KeepImages:
    """Keeps the images of the first group of every `telemetry.samples_every`-th update in samples/.

    The report shows them beside the rewards; the directory is pruned by nobody, so few are kept.
    """
    config, samples = context.config, context.run_directory.samples
    every = config.telemetry.samples_every * config.learner.groups_per_step

    def keep(task: GroupTask, sampled: SampledGroup, scores: GroupScores) -> None:
        if every == 0 or task.ordinal % every:
            return
        place = samples / f"step-{task.ordinal // config.learner.groups_per_step:06d}"
        place.mkdir(exist_ok=True)
        file = place / f"group-{task.ordinal:06d}.png"
        write_strip(sampled.images, file)
        record = {
            "ordinal": task.ordinal,
            "prompt": task.prompt.text,
            "version": str(task.version),
            "rewards": scores.rewards,
            "details": scores.details,
        }
        file.with_suffix(".json").write_text(json.dumps(record))

    return keep
