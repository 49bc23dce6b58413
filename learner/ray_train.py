"""The learner on Ray Train: binds the loop to the real trainer, on one rank or several.

Promises
- Whenever Ray Train starts the ranks, first or again, they go on from the newest complete checkpoint of the
  run directory, in a new epoch. A rank that dies takes the others with it: all are started again. Newer
  checkpoints that are not right are told of as events; where none is right, the run ends.
- Rank 0 alone deals with the queue, publishes, completes checkpoints and writes metrics (learner/loop.py);
  the others do what it orders (learner/follower.py).
- The state lives in the run directory, not in Ray Train's own checkpoints (docs/decisions says why); Ray
  Train restarts ranks and shows the run in the Ray dashboard.
- Crashes and lost connections are restarted `learner.max_restarts` times. What a restart cannot mend, such as
  a full disk, and a learner that gets no place in the cluster within `cluster.start_deadline_s`, ends the run
  with its text.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray.train
import torch

from learner.checkpoint import CheckpointsUnusable
from learner.epochs import EpochFile
from learner.follower import follow
from learner.loop import LearnerLoop
from learner.ranks import Order, RankFailedForGood, RankLost, Ranks, RanksDiffer, together
from learner.recorder import UntrainedTrainer, recording
from learner.sharded_checkpoint import CheckpointRefused
from learner.trainer import PolicyTrainer
from learner.update import UpdateError
from policy.loading import find_device
from policy.parking import Parking
from services.card import OwnCard, card_of
from services.config import ClusterConfig, Config, LearnerConfig
from services.context import RunContext
from services.full_disk import disk_refuses
from services.group_queue import Fenced, GroupQueue, QueueTimeout
from services.heartbeat import BEATS_TO_LIVE, Pulse
from services.logs import configure_logging
from services.process_title import show_title
from services.ray_runtime import learner_backend, nccl_listens_where_ray_does
from services.transports.choice import open_transport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)


# A replaced learner that starts again fences its successor; workers that made no groups in time make none in
# as much time again; a machine that computes wrongly would do it again. ConfigError, PolicyError and a
# checkpoint of another model are ValueErrors; of damaged checkpoints none mends itself.
LASTING = (
    *(Fenced, QueueTimeout, UpdateError, ValueError, RankFailedForGood, RanksDiffer),
    *(CheckpointRefused, CheckpointsUnusable),
)

# Kinds of ControllerError.controller_failure; they are internal to Ray Train, hence by name.
NOT_PLACED = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")

GOODBYE_S = 10.0
"""For telling the other ranks that the run has failed; they end anyway, later and with poorer words."""
REPORT_EVERY_S = 5.0
"""Ray Train's controller takes a report every 2 s, and a rank that has another one waits for it that long."""


class LearnerFailed(RuntimeError):
    """The learner has ended and was not restarted: the text says why."""


def learner_pulse(part: str, queue: GroupQueue, config: Config) -> Pulse:
    """The heartbeat of a rank."""
    every_s = config.telemetry.heartbeat_s
    ttl, hang_s = BEATS_TO_LIVE * every_s, config.learner.hang_s
    return Pulse(part, lambda beat: queue.beat(beat, ttl), every_s=every_s, hang_s=hang_s, show=show_title)


def train_rank(settings: dict[str, Any]) -> str | None:
    """What Ray Train runs on a rank.

    Args:
        settings: `context` (RunContext as JSON) and `store` (handle of the PolicyStore actor).

    Returns:
        Why the run must end, or None when it was trained to its end. Ray Train would restart whatever raises.
    """

    context = RunContext.model_validate_json(settings["context"])
    config = context.config
    ranks = _ranks(config.learner) if config.learner.ranks > 1 else None
    part = f"learner-{ranks.rank if ranks is not None else 0}"
    configure_logging(part, context.directory, run=context.run)
    if "nccl" in (learner_backend(config) or ""):
        nccl_listens_where_ray_does()
    try:
        queue = together(ranks, "the opening of the queue", partial(context.open_queue, "learner"))
        with learner_pulse(part, queue, config) as pulse:
            card = card_of(config, queue, pulse)
            # Until the first weights are published (learner/loop.py).
            card.take()
            pulse.enter("loading the model")
            transport = open_transport(config, context.directory, settings["store"])
            if ranks is None:
                kind = PolicyTrainer if context.record is None else UntrainedTrainer
                alone = kind(context, transport)
                card.state = Parking(alone.held, alone.policy.device)
                _lead(context, queue, alone, pulse, card=card)
                return None
            make = partial(PolicyTrainer, context, transport, ranks)
            trainer = together(ranks, "the loading of the model", make)
            if trainer.sharded:
                pulse.enter("dividing the model")
                trainer.divide(_mesh(config))
            if ranks.rank == 0:
                _lead_others(context, queue, trainer, pulse, ranks)
                return None
            trainer.begin()
            return follow(
                *(ranks, trainer.updater, pulse),
                beside_s=config.queue.take_deadline_s,
                report=partial(ray.train.report, {}),
                writer=trainer.rows_writer,
            )
    except Exception as error:
        reason = _for_good(error, context)
        if reason is None:
            logger.exception("%s failed", part)
            raise
        logger.exception("%s failed for good", part)
        return reason


def _for_good(error: Exception, context: RunContext) -> str | None:
    """Why the run must end, where a restart would fail as this did; None where it may help."""
    if isinstance(error, LASTING):
        return f"{type(error).__name__}: {error}"
    refused = disk_refuses(error, context.directory)
    if refused is None or context.record is not None:
        return refused
    return f"{refused}, then go on with --resume"


def _lead(
    context: RunContext,
    queue: GroupQueue,
    trainer: PolicyTrainer | UntrainedTrainer,
    pulse: Pulse,
    ranks: Ranks | None = None,
    card: OwnCard | None = None,
) -> None:
    """The learner's loop, from the newest checkpoint to its end."""
    start = trainer.begin()
    logger.info("starts at step %d", start.step)
    with recording(context, start) as record:
        loop = LearnerLoop(
            *(context.config, queue, trainer, pulse),
            on_step=_reporter(ranks),
            record=record,
            curriculum=trainer.curriculum,
            card=card or OwnCard(),
            epochs=EpochFile(context.directory),
        )
        try:
            loop.run(start)
        finally:
            trainer.close()


def _lead_others(
    context: RunContext, queue: GroupQueue, trainer: PolicyTrainer, pulse: Pulse, ranks: Ranks
) -> None:
    """The same, and the other ranks end with it."""
    try:
        _lead(context, queue, trainer, pulse, ranks)
    except Exception as error:
        reason = _for_good(error, context)
        if reason is not None and ranks.listening:
            try:
                ranks.order_all(Order(do="end", reason=reason), deadline_s=GOODBYE_S)
            except RankLost:
                logger.warning("the other ranks could not be told that the run has failed", exc_info=True)
        raise
    ranks.order_all(Order(do="end"))


def _ranks(settings: LearnerConfig) -> Ranks:
    """Of this process, in the process group that Ray Train has made."""
    whole = torch.distributed.group.WORLD
    return Ranks(whole, whole, deadline_s=settings.rank_deadline_s, lasting=LASTING)


def _mesh(config: Config) -> DeviceMesh:
    """Of all ranks, between the devices of their models."""
    # Here: what it imports takes a second, and only shards need it.
    from torch.distributed.device_mesh import DeviceMesh

    world = torch.distributed.group.WORLD
    assert world is not None
    return DeviceMesh.from_group(world, find_device(config.model.device).type)


def fit(context: RunContext, store: Any) -> None:
    """Run the learner to its end; called by the driver, in a thread of its own.

    Raises:
        LearnerFailed: it got no place in the cluster, or failed in a way that a restart cannot mend.
        ray.train.TrainingFailedError: the restarts of `learner.max_restarts` did not help.
    """
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class OneProcess(TorchConfig):  # type: ignore[misc]
        """One rank talks to nobody: no process group, which would listen on every interface."""

        backend_cls = Backend

    settings, cluster = context.config.learner, context.config.cluster
    resources, ranks = _resources(settings), settings.ranks
    # Ray Train hands these variables of the driver on to its controller, on a joined cluster too.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_deadline_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(settings.rank_deadline_s)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"context": context.model_dump_json(), "store": store},
        torch_config=(OneProcess if ranks == 1 else TorchConfig)(
            backend=learner_backend(context.config), timeout_s=math.ceil(settings.rank_deadline_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=ranks,
            use_gpu=settings.num_gpus > 0,
            resources_per_worker=resources,
            accelerator_type=settings.accelerator_type,
            placement_strategy=settings.placement.upper(),
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
        raise LearnerFailed(_not_placed(settings, cluster, ranks)) from None
    if result.return_value is not None:
        raise LearnerFailed(result.return_value)


def _resources(settings: LearnerConfig) -> dict[str, float]:
    resources = {"CPU": settings.num_cpus, **settings.resources}
    if settings.num_gpus:
        resources["GPU"] = settings.num_gpus
    return resources


def _not_placed(settings: LearnerConfig, cluster: ClusterConfig, ranks: int) -> str:
    asked = _resources(settings)
    there = ray.cluster_resources()
    each = "a rank asks" if ranks == 1 else f"each of {ranks} ranks asks"
    on = f" on a node with {settings.accelerator_type}" if settings.accelerator_type is not None else ""
    found = "no node had that" if ranks == 1 else "there was not as much"
    return (
        f"it could not be placed: {each} for {_amounts(asked)}{on} (learner.num_cpus, learner.num_gpus), "
        f"and {found} free within {cluster.start_deadline_s:g} s (cluster.start_deadline_s); "
        f"the whole cluster has {_amounts({name: there.get(name, 0.0) for name in asked})}"
    )


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _reporter(ranks: Ranks | None) -> Callable[[dict[str, Any]], None]:
    """Tells Ray Train how far the learner is, no oftener than it listens; it wants a report of each rank."""
    last = float("-inf")

    def report(row: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY_S:
            if ranks is not None:
                ranks.order_all(Order(do="report", step=row["step"]))
            ray.train.report({"step": row["step"], "reward_mean": row["reward_mean"], "pid": os.getpid()})
            if ranks is not None:
                ranks.settled()
            last = time.monotonic()

    return report
