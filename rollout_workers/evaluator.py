"""The evaluator as a Ray actor: evaluates announced EMA weights beside the training."""

from __future__ import annotations

import json
import logging
import time

import ray
import torch

from policy.parking import Parking
from rollout_workers.evaluation import Evaluation, evaluate
from rollout_workers.policy_sampler import PolicySampler
from rollout_workers.scoring import RewardServers
from services.card import card_of
from services.context import RunContext
from services.heartbeat import BEATS_TO_LIVE, Pulse
from services.images import write_grid
from services.logs import configure_logging
from services.messages import WeightsAnnouncement
from services.metrics import EvalRow, When
from services.policy_store import WeightsGone
from services.process_title import show_title
from services.prompts import prompt_source
from services.ray_runtime import NAMESPACE, POLICY_STORE, actor_name
from services.transports.choice import open_transport

logger = logging.getLogger(__name__)

GRID_IMAGES = 64
GRID_COLUMNS = 8


class Evaluator:
    """Evaluates versions one after the other.

    Args:
        context: RunContext as JSON.
    """

    def __init__(self, context: str) -> None:
        self._context = RunContext.model_validate_json(context)
        # By its name: a handle among the arguments of an actor that Ray makes anew may be gone by then.
        store = ray.get_actor(actor_name(self._context.run, POLICY_STORE), namespace=NAMESPACE)
        configure_logging("evaluator", self._context.directory, run=self._context.run)
        torch.set_num_threads(self._context.config.rollout.threads)
        self._queue = self._context.open_queue("worker")
        telemetry = self._context.config.telemetry
        ttl = BEATS_TO_LIVE * telemetry.heartbeat_s
        self._pulse = Pulse(
            "evaluator",
            lambda beat: self._queue.beat(beat, ttl),
            every_s=telemetry.heartbeat_s,
            hang_s=self._context.config.eval.deadline_s,
            show=show_title,
        )
        self._pulse.__enter__()
        config, directory = self._context.config, self._context.directory
        self._card = card_of(config, self._queue, self._pulse)
        with self._card.turn():
            self._pulse.enter("loading the model")
            self._sampler = PolicySampler(config, directory, open_transport(config, directory, store))
            self._card.state = Parking(self._sampler.policy.held, self._sampler.policy.device)
        self._scorer = RewardServers(self._context.config.rewards, self._context.rewards)
        self._prompts = prompt_source(self._context.config)
        self._pulse.enter("waiting for weights", waits=True)

    def evaluate(self, announcement: str, when: When) -> str | None:
        """One evaluation of announced weights.

        Args:
            announcement: WeightsAnnouncement as JSON.

        Returns:
            An EvalRow as JSON; None when nobody has these weights any more, which a learner's crash brings
            about: its next life announces newer ones.
        """
        told = WeightsAnnouncement.model_validate_json(announcement)
        try:
            with self._card.turn():
                self._pulse.enter(f"evaluating {told.version}")
                return self._evaluate(told, when).model_dump_json()
        except WeightsGone as error:
            logger.warning("evaluation skipped: %s", error)
            return None
        finally:
            self._pulse.enter("waiting for weights", waits=True)

    def _evaluate(self, told: WeightsAnnouncement, when: When) -> EvalRow:
        config = self._context.config
        self._sampler.install(told)
        self._pulse.version = told.version
        final = when != "during"
        count = config.eval.final_prompts if final else config.eval.prompts
        found = evaluate(
            self._sampler.policy,
            self._scorer,
            config,
            self._prompts.heldout(config.eval.seed, count),
            with_diversity=final,
        )
        if final:
            self._keep(found, when)
        return EvalRow(
            time=time.time(),
            when=when,
            epoch=told.version.epoch,
            step=told.version.step,
            prompts=len(found.prompts),
            rewards=found.rewards,
            exact=found.exact,
            diversity=found.diversity,
            seconds=found.seconds,
        )

    def _keep(self, found: Evaluation, when: When) -> None:
        samples = self._context.run_directory.samples
        write_grid(found.images[:GRID_IMAGES], samples / f"eval-{when}.png", columns=GRID_COLUMNS)
        scores = found.scores
        records = [
            {
                "prompt": prompt.text,
                "scores": {name: values[place] for name, values in scores.rewards.items()},
                "details": {name: items[place] for name, items in scores.details.items()},
            }
            for place, prompt in enumerate(found.prompts)
        ]
        (samples / f"eval-{when}.json").write_text(json.dumps(records))
