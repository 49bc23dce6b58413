"""The learner on Ray Train: binds the loop to the real policy, update, policy store and checkpoints.

Promises
- Whenever Ray Train starts a rank, first or again, it goes on from the newest complete checkpoint of the run
  directory, in a new epoch.
- The state lives in the run directory, not in Ray Train's own checkpoints (docs/decisions says why); Ray
  Train restarts ranks and shows the run in the Ray dashboard.
- Crashes and lost connections are restarted `learner.max_restarts` times. What a restart cannot mend, such as
  a full disk, and a learner that gets no place in the cluster within `cluster.start_deadline_s`, ends the run
  with its text.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray.train
import torch

from learner.checkpoint import newest_checkpoint, write_checkpoint
from learner.curriculum import PART, curriculum_of
from learner.loop import LearnerLoop, Start
from learner.recorder import UntrainedTrainer, recording
from learner.update import TrainingGroup, UpdateError, Updater
from policy import load_policy
from services.codec import Group
from services.config import ClusterConfig, LearnerConfig
from services.context import RunContext
from services.full_disk import disk_refuses
from services.group_queue import Fenced, Frontier, QueueTimeout
from services.heartbeat import BEATS_TO_LIVE, Pulse
from services.logs import configure_logging
from services.messages import PolicyVersion, WeightsAnnouncement
from services.policy_store import publish

logger = logging.getLogger(__name__)

# A replaced learner that starts again fences its successor; workers that made no groups in time make none in
# as much time again. ConfigError, PolicyError and a checkpoint of another model are ValueErrors.
LASTING = (Fenced, QueueTimeout, UpdateError, ValueError)

# Kinds of ControllerError.controller_failure; they are internal to Ray Train, hence by name.
NOT_PLACED = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")

REPORT_EVERY_S = 5.0
"""Ray Train's controller takes a report every 2 s, and a rank that has another one waits for it that long."""


class LearnerFailed(RuntimeError):
    """The learner has ended and was not restarted: the text says why."""


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
            # Conditions travel with the groups; only guidance needs the empty prompt's as well.
            text_encoders=config.learner_guides,
            vae=False,
            base=objective.needs_base,
            seed=config.run.seed,
        )
        self.updater = Updater(self.policy, config)
        self.curriculum = curriculum_of(config)

    def restore(self) -> Start:
        """Load the newest complete checkpoint, if there is one."""
        found = newest_checkpoint(self._context.directory)
        if found is None:
            return Start()
        if self.curriculum is not None:
            self.curriculum.load_state(found.state)
        self.updater.load_state({part: found.state[part] for part in found.state if part != PART})
        return Start(
            version=PolicyVersion(epoch=found.manifest["epoch"], step=found.step),
            frontier=Frontier.model_validate(found.manifest["frontier"]),
        )

    def update(self, groups: Sequence[Group], step: int) -> dict[str, Any]:
        return self.updater.step([training_group(group) for group in groups], step).row()

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        tensors = self.updater.ema_tensors() if kind == "ema" else self.updater.rollout_tensors(version.step)
        return publish(self._store, tensors, version, kind=kind)

    def checkpoint(self, version: PolicyVersion, frontier: Frontier) -> None:
        write_checkpoint(
            self._context.directory,
            version.step,
            self.updater.state() | ({PART: self.curriculum.state()} if self.curriculum is not None else {}),
            {"epoch": version.epoch, "frontier": frontier.model_dump(mode="json")},
            keep=self._context.config.checkpoint.keep,
        )


def train_rank(settings: dict[str, Any]) -> str | None:
    """What Ray Train runs on a rank.

    Args:
        settings: `context` (RunContext as JSON) and `store` (handle of the PolicyStore actor).

    Returns:
        Why the run must end, or None when it was trained to its end. Ray Train would restart whatever raises.
    """

    context = RunContext.model_validate_json(settings["context"])
    configure_logging("learner-0", context.directory, run=context.run)
    config = context.config
    ttl = BEATS_TO_LIVE * config.telemetry.heartbeat_s
    try:
        queue = context.open_queue()
        with Pulse(
            "learner-0", lambda beat: queue.beat(beat, ttl), every_s=config.telemetry.heartbeat_s
        ) as pulse:
            pulse.enter("loading the model")
            kind = PolicyTrainer if context.record is None else UntrainedTrainer
            trainer = kind(context, settings["store"])
            start = trainer.restore()
            logger.info("starts at step %d", start.step)
            with recording(context, start) as record:
                loop = LearnerLoop(
                    *(config, queue, trainer, pulse),
                    on_step=_reporter(),
                    record=record,
                    curriculum=trainer.curriculum,
                )
                loop.run(start)
    except LASTING as error:
        logger.exception("learner-0 failed for good")
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        refused = disk_refuses(error, context.directory)
        if refused is None:
            logger.exception("learner-0 failed")
            raise
        logger.exception("learner-0 failed for good")
        return refused if context.record is not None else f"{refused}, then go on with --resume"
    return None


def fit(context: RunContext, store: Any) -> None:
    """Run the learner to its end; called by the driver, in a thread of its own.

    Raises:
        LearnerFailed: it got no place in the cluster, or failed in a way that a restart cannot mend.
        ray.train.TrainingFailedError: the restarts of `learner.max_restarts` did not help.
    """
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings, cluster = context.config.learner, context.config.cluster
    resources = _resources(settings)
    # Ray Train hands this variable of the driver on to its controller, on a joined cluster too.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_deadline_s)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"context": context.model_dump_json(), "store": store},
        scaling_config=ScalingConfig(
            num_workers=settings.ranks, use_gpu=settings.num_gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=context.run,
            storage_path=str(context.directory / "ray_train"),
            # Ray Train's own default is to look for a place again and again, for ever.
            failure_config=FailureConfig(max_failures=settings.max_restarts, controller_failure_limit=0),
        ),
    )
    try:
        result = trainer.fit()
    except ControllerError as error:
        if type(error.controller_failure).__name__ not in NOT_PLACED:
            raise
        raise LearnerFailed(_not_placed(settings, cluster)) from None
    if result.return_value is not None:
        raise LearnerFailed(result.return_value)


def _resources(settings: LearnerConfig) -> dict[str, float]:
    resources = {"CPU": settings.num_cpus}
    if settings.num_gpus:
        resources["GPU"] = settings.num_gpus
    return resources


def _not_placed(settings: LearnerConfig, cluster: ClusterConfig) -> str:
    asked = _resources(settings)
    there = ray.cluster_resources()
    return (
        f"it could not be placed: a rank asks for {_amounts(asked)} (learner.num_cpus, learner.num_gpus), "
        f"and no node had that free within {cluster.start_deadline_s:g} s (cluster.start_deadline_s); "
        f"the whole cluster has {_amounts({name: there.get(name, 0.0) for name in asked})}"
    )


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _reporter() -> Callable[[dict[str, Any]], None]:
    """Tells Ray Train how far the rank is, no oftener than it listens."""
    last = float("-inf")

    def report(row: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY_S:
            ray.train.report({"step": row["step"], "reward_mean": row["reward_mean"], "pid": os.getpid()})
            last = time.monotonic()

    return report


def training_group(group: Group) -> TrainingGroup:
    header = group.header
    return TrainingGroup(
        ordinal=header.ordinal,
        latents=group.tensors["latents"],
        rewards=header.rewards,
        condition=_prefixed(group.tensors, "condition."),
        sampled_at=header.version.step,
        trajectory=group.tensors.get("trajectory"),
        log_likelihoods=group.tensors.get("log_likelihoods"),
    )


def _prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
