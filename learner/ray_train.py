"""The learner on Ray Train: binds the loop to the real policy, update, policy store and checkpoints.

Promises
- Whenever Ray Train starts a rank, first or again, it goes on from the newest complete checkpoint of the run
  directory, in a new epoch.
- The state lives in the run directory, not in Ray Train's own checkpoints (docs/decisions says why); Ray
  Train restarts ranks and shows the run in the Ray dashboard.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import ray.train
import torch

from learner.checkpoint import newest_checkpoint, write_checkpoint
from learner.loop import LearnerLoop, Start
from learner.update import TrainingGroup, Updater
from policy import load_policy
from services.codec import Group
from services.context import RunContext
from services.group_queue import Frontier
from services.heartbeat import Pulse
from services.logs import configure_logging
from services.messages import PolicyVersion, WeightsAnnouncement
from services.policy_store import publish

logger = logging.getLogger(__name__)

BEATS_TO_LIVE = 5


class PolicyTrainer:
    """The real trainer of the loop (learner/loop.py `Trainer`)."""

    def __init__(self, context: RunContext, store: Any) -> None:
        self._context = context
        self._store = store
        config = context.config
        torch.set_num_threads(config.learner.threads)
        objective = config.objective
        self.policy = load_policy(
            config.model,
            # Conditions travel with the groups; only a guided reference needs the empty prompt's as well.
            text_encoders=objective.kl_cfg > 1,
            vae=False,
            base=objective.reference == "frozen" or objective.kl > 0,
            seed=config.run.seed,
        )
        self.updater = Updater(self.policy, config)

    def restore(self) -> Start:
        """Load the newest complete checkpoint, if there is one."""
        found = newest_checkpoint(self._context.directory)
        if found is None:
            return Start()
        self.updater.load_state(found.state)
        return Start(
            version=PolicyVersion(epoch=found.manifest["epoch"], step=found.step),
            frontier=Frontier.model_validate(found.manifest["frontier"]),
        )

    def update(self, groups: Sequence[Group], step: int) -> dict[str, Any]:
        return self.updater.step([_training_group(group) for group in groups], step).row()

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        tensors = self.updater.ema_tensors() if kind == "ema" else self.updater.rollout_tensors(version.step)
        return publish(self._store, tensors, version, kind=kind)

    def checkpoint(self, version: PolicyVersion, frontier: Frontier) -> None:
        write_checkpoint(
            self._context.directory,
            version.step,
            self.updater.state(),
            {"epoch": version.epoch, "frontier": frontier.model_dump(mode="json")},
            keep=self._context.config.checkpoint.keep,
        )


def train_rank(settings: dict[str, Any]) -> None:
    """What Ray Train runs on a rank.

    Args:
        settings: `context` (RunContext as JSON) and `store` (handle of the PolicyStore actor).
    """

    context = RunContext.model_validate_json(settings["context"])
    configure_logging("learner-0", context.directory, run=context.run)
    config = context.config
    queue = context.open_queue()
    ttl = BEATS_TO_LIVE * config.telemetry.heartbeat_s
    try:
        with Pulse(
            "learner-0", lambda beat: queue.beat(beat, ttl), every_s=config.telemetry.heartbeat_s
        ) as pulse:
            pulse.enter("loading the model")
            trainer = PolicyTrainer(context, settings["store"])
            start = trainer.restore()
            logger.info("starts at step %d", start.step)
            loop = LearnerLoop(config, queue, trainer, pulse, on_step=_report)
            loop.run(start)
    except Exception:
        logger.exception("learner-0 failed")
        raise


def fit(context: RunContext, store: Any) -> None:
    """Run the learner to its end; called by the driver, in a thread of its own.

    Raises:
        ray.train.TrainingFailedError: the restarts of `learner.max_restarts` did not help.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = context.config.learner
    resources = {"CPU": settings.num_cpus}
    if settings.num_gpus:
        resources["GPU"] = settings.num_gpus
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"context": context.model_dump_json(), "store": store},
        scaling_config=ScalingConfig(
            num_workers=settings.ranks, use_gpu=settings.num_gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=context.run,
            storage_path=str(context.directory / "ray_train"),
            failure_config=FailureConfig(max_failures=settings.max_restarts),
        ),
    )
    trainer.fit()


def _report(row: dict[str, Any]) -> None:
    ray.train.report({"step": row["step"], "reward_mean": row["reward_mean"], "pid": os.getpid()})


def _training_group(group: Group) -> TrainingGroup:
    header = group.header
    return TrainingGroup(
        ordinal=header.ordinal,
        latents=group.tensors["latents"],
        rewards=header.rewards,
        condition=_prefixed(group.tensors, "condition."),
    )


def _prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
