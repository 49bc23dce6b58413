"""The driver: starts every part of a run in order, watches it to its end, and stops every part in order.

Promises
- Owns what it starts: rollout workers (or a feeder, where groups come from a recording), evaluator, policy
  store, reward servers, embedded queue and, on a single machine, Ray itself. When the driver ends, they end.
- Starts no evaluator without held-out prompts, and no reward server where nothing will be scored.
- A run ends in exactly one of three ways: done (max_steps reached), interrupted (drained, checkpoint
  written), or failed by an exception that names the part and its last error.
- Is the only writer of metrics.jsonl: the other parts send rows through the queue server.

What happens while the run goes on is in services/monitor.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import redis
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, SchedulingStrategyT

from learner.ray_train import fit
from reward_servers.launch import scale_reward, start_rewards, stop_rewards
from rollout_workers.evaluator import Evaluator
from rollout_workers.feeder import Feeder
from rollout_workers.worker import RolloutWorker
from services.cluster_room import WorkerPlaces, require_room
from services.config import Config
from services.config.placement import actor_options
from services.config_file import ConfigError
from services.context import RewardPlace, RunContext, SecretPlace, queue_authority, reward_authority
from services.demands import demands
from services.formatting import reason
from services.group_queue import GroupQueue
from services.logs import configure_logging
from services.monitor import LearnerThread, Monitor, Outcome
from services.policy_store import PolicyStore
from services.preflight import refuse_unusable
from services.progress import Progress
from services.prompts import evaluates
from services.queue_connection import place
from services.queue_keeper import QueueKeeper
from services.ray_metrics import RunMetrics
from services.ray_runtime import NAMESPACE, POLICY_STORE, actor_name, ray_cluster
from services.resuming import reconfigure
from services.run_directory import RunDirectory
from services.stock_shift import other_shift
from services.stop_signals import StopSignals
from services.supervisor import PartFailed, Supervisor
from services.telemetry import Telemetry
from services.trackers import tracker_sinks

logger = logging.getLogger(__name__)

JOIN_DEADLINE_S = 60.0
QUEUE_LOST = (redis.ConnectionError, redis.TimeoutError)


def train(
    config: Config, run: RunDirectory, view: Progress, *, resume: bool = False, record: Path | None = None
) -> Outcome:
    """Run to `learner.max_steps`, or until asked to stop.

    Args:
        config: of the run; with `resume`, its own plus overrides, which are kept (services/resuming.py).
        run: its directory.
        view: told everything a person wants to see.
        resume: go on from the newest complete checkpoint.
        record: train and evaluate nothing; write the groups of the untrained model here (services/record.py).

    Raises:
        Interrupted: asked to stop before the parts were started.
        ConfigError, QueueUnreachable, RewardError, PolicyError: something is not as the configuration needs.
        PartFailed: a part kept failing; its last error is in the text.
        CheckpointsUnusable: resuming, and no checkpoint can be gone on from.
    """
    configure_logging("driver", run.root, run=run.name, stream_level=None)
    refuse_unusable(config)
    evaluating = evaluates(config) and record is None
    with ExitStack() as stack:
        stack.enter_context(run.locked())
        if resume:
            reconfigure(run, config)
        view.activity("starting Ray")
        own_ray = stack.enter_context(ray_cluster(config))
        # After ray.init, which replaces the handlers that were there before it.
        signals = stack.enter_context(StopSignals())
        signals.check()
        view.activity("starting the queue")
        queue_url, queue_password, keeper = stack.enter_context(_queue_server(config, run))
        context = RunContext(
            run=run.name,
            directory=run.root,
            config=config,
            queue_url=queue_url,
            queue_password=queue_password,
            queue_authority=queue_authority(config),
            record=record,
        )
        queue = context.open_queue("driver")
        # The queue of a resumed run remembers the parts of the run before.
        for part in queue.heartbeats():
            queue.forget(part)
        queue.want_workers(config.rollout.workers)
        for reward in config.rewards:
            if reward.app is not None:
                queue.want_replicas(reward.name, None)
        queue.set_state("starting")
        stack.push(partial(_tell_failure, queue))

        def waiting(text: str) -> None:
            signals.check()
            view.activity(text)
            queue.set_state("starting", text)

        require_room(config, demands(config, evaluating=evaluating), own_ray=own_ray, tell=waiting)
        queue.set_state("starting")
        # What it has is in no other place: it is lost with the driver's node, and with no other.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        store = _actor(PolicyStore, context, POLICY_STORE, num_cpus=0, scheduling_strategy=here).remote()
        # By hand: an actor lives as long as anything refers to it, and its name with it.
        stack.callback(ray.kill, store)
        # The learner takes longest to start and needs no rewards until the first groups are there.
        learner = LearnerThread(partial(fit, context, store))
        learner.start()
        if evaluating or not config.offline:
            view.activity("starting the reward servers")
            places = stack.enter_context(reward_places(config, run, own_ray))
            context = context.model_copy(update={"rewards": places})
        signals.check()
        metrics = RunMetrics(run.name, [reward.name for reward in config.rewards])
        telemetry = stack.enter_context(
            Telemetry(
                run.root,
                tensorboard=config.telemetry.tensorboard,
                beside=[metrics, *stack.enter_context(tracker_sinks(config, run))],
            )
        )
        tell_other_shift(config, telemetry, view)
        text = context.model_dump_json()
        evaluator = None
        if evaluating:
            evaluator = _evaluator(context).remote(text)
            stack.callback(ray.kill, evaluator)

        worker_places = WorkerPlaces(config)
        workers = 1 if config.offline else queue.wanted_workers() or config.rollout.workers
        supervisor = Supervisor(
            spawn=lambda index: _spawn(context, text, index, store, worker_places.next(index)),
            count=workers,
            max_restarts=config.rollout.max_restarts,
            on_death=lambda part, why: monitor.worker_died(part, why),
            part=_part(config),
            on_leave=lambda part: monitor.worker_left(part),
        )
        monitor = Monitor(
            *(context, queue, telemetry, metrics, view, evaluator),
            *(supervisor, learner, signals, keeper, partial(_scale_reward, config, run)),
        )
        view.activity("loading the models")
        # Stopped in reverse order: the state first, so that workers end by themselves.
        stack.callback(supervisor.join, JOIN_DEADLINE_S)
        stack.push(partial(_tell_failure, queue))
        queue.set_state("running")
        if not config.offline:
            worker_places.plan(workers)
        supervisor.start()
        try:
            return monitor.watch()
        except QUEUE_LOST as error:
            why = keeper.problem if keeper is not None and keeper.problem else error
            raise PartFailed(f"the queue server at {place(queue_url)} was lost: {why}") from error


def tell_other_shift(config: Config, telemetry: Telemetry, view: Progress) -> None:
    """An event where the shift is not that of the image size: it is seen, and stays in the run's record."""
    shift = other_shift(config)
    if shift is not None:
        view.row(telemetry.event("other shift", ": ".join(shift), level="warning"))


def _tell_failure(
    queue: GroupQueue, kind: type[BaseException] | None, error: BaseException | None, trace: object
) -> None:
    """Where an exception ends the driver: no part may go on without it. Every other end is the monitor's."""
    if error is None or isinstance(error.__cause__, QUEUE_LOST):
        return  # all is well, or the queue is gone and there is no way to tell anybody
    try:
        queue.set_state("failed", reason(error))
    except Exception:  # it must not hide what ended the run
        logger.warning("the parts could not be told that the run has failed", exc_info=True)


@contextmanager
def _queue_server(config: Config, run: RunDirectory) -> Iterator[tuple[str, SecretPlace, QueueKeeper | None]]:
    if config.queue.url is not None:
        yield config.queue.url, SecretPlace(env=config.queue.password_env), None
        return
    with QueueKeeper(run.queue, server=config.queue.server) as keeper:
        yield keeper.server.url, SecretPlace(file=run.queue / "password"), keeper


@contextmanager
def reward_places(config: Config, run: RunDirectory, own_ray: bool) -> Iterator[dict[str, RewardPlace]]:
    """Where the reward servers are; those named by app run inside the block.

    Args:
        own_ray: Ray ends with this process anyway, and Serve with it: shutting Serve down first only makes it
            complain.
    """
    own = [reward for reward in config.rewards if reward.app is not None]
    places = {
        reward.name: RewardPlace(
            url=reward.url, token=SecretPlace(env=reward.token_env), authority=reward_authority(reward)
        )
        for reward in config.rewards
        if reward.url is not None
    }
    for reward in config.rewards:
        if reward.url is not None and reward.batching == "request":
            _refuse_merging(reward.name, places[reward.name])
    if not own:
        yield places
        return
    token = run.secret("reward.token")
    urls = start_rewards(
        own, token_file=token, port=config.cluster.serve_port, deadline_s=config.cluster.start_deadline_s
    )
    try:
        yield places | {
            name: RewardPlace(url=url, token=SecretPlace(file=token)) for name, url in urls.items()
        }
    finally:
        if not own_ray:
            stop_rewards()


def _scale_reward(config: Config, run: RunDirectory, name: str, replicas: int) -> None:
    reward = next(reward for reward in config.rewards if reward.name == name)
    scale_reward(reward, replicas, token_file=run.secret("reward.token"))


def _refuse_merging(name: str, place: RewardPlace) -> None:
    """A server that does not answer now is left to the requests that follow, which name it."""
    client = place.client(name)
    info = client.info()
    client.close()
    if info is not None and info.batching == "dynamic" and not info.batch_invariant:
        raise ConfigError(
            f"reward {name!r}: the server at {place.url} merges requests, and its scores depend on what they "
            "are merged with; start it with batching 'request', or accept it: rewards[].batching: dynamic"
        )


def _actor(kind: type, context: RunContext, part: str, **options: Any) -> Any:
    return ray.remote(kind).options(name=actor_name(context.run, part), namespace=NAMESPACE, **options)


def _evaluator(context: RunContext) -> Any:
    """Made anew by Ray, which asks again for an evaluation that was lost: it would come out the same."""
    lives = context.config.rollout.max_restarts
    again = {"max_restarts": lives, "max_task_retries": lives}
    return _actor(Evaluator, context, "evaluator", **actor_options(context.config.eval), **again)


def _part(config: Config) -> str:
    return "feeder" if config.offline else "rollout"


def _spawn(
    context: RunContext, text: str, index: int, store: Any, place: SchedulingStrategyT
) -> tuple[Any, Any]:
    name = f"{_part(context.config)}-{index}"
    # `run` occupies one thread; a second one answers __ray_terminate__ and profiling.
    if context.config.offline:
        worker = _actor(Feeder, context, name, num_cpus=0, max_concurrency=2).remote(text, index)
    else:
        options = actor_options(context.config.rollout) | {"scheduling_strategy": place}
        worker = _actor(RolloutWorker, context, name, max_concurrency=2, **options).remote(text, index, store)
    return worker, worker.run.remote()
