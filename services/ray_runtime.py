"""Joining a Ray cluster, or starting one on loopback for a single machine.

Promises
- A Ray that this run starts is shut down with it, and listens on loopback alone.
- It asks every client for a token: Ray's own default, which RAY_AUTH_MODE=disabled would switch off.
- A signal to this process and its group (Ctrl-C, `timeout`, `kill -- -PGID`) does not reach the Ray that it
  started: the driver ends it when everything has been drained.
- Usage statistics stay off: nothing is sent anywhere.
- What a run reserves from its start fits, or it is told before anything waits for a place. Replicas that load
  alone brings (`max_replicas`) need not fit: that is a warning.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from tenacity import retry, stop_after_attempt

from services.config import Config, RewardConfig, Section
from services.config_file import ConfigError
from services.prompts import evaluates

logger = logging.getLogger(__name__)

NAMESPACE = "dgpo"
STARTS = 3

Resource = Literal["num_cpus", "num_gpus"]
"""The setting that reserves it."""
UNITS: dict[Resource, str] = {"num_cpus": "CPUs", "num_gpus": "GPUs"}
GROWTH_REMEDY = (
    "lower max_replicas of rewards, or give the run more room: Serve starts what fits, and a worker or "
    "learner that restarts may find its place taken"
)


def reserved(config: Config, resource: Resource) -> float:
    """Ray CPUs or GPUs that the parts of a run reserve together from its start; controllers reserve none."""

    return sum(_pieces(config, resource))


def whole_gpus(config: Config) -> int:
    """GPUs that a run takes from its start: a fraction of one is never spread over two.

    Largest first, each where it fits; Ray, which places parts as they come, may need more if they are of many
    sizes.
    """
    room: list[int] = []
    # In ten-thousandths, as Ray counts: 0.8 + 0.1 + 0.1 is one.
    for piece in sorted((round(piece * 10_000) for piece in _pieces(config, "num_gpus")), reverse=True):
        place = next((place for place, left in enumerate(room) if piece <= left), None)
        if place is not None:
            room[place] -= piece
        elif piece:
            room += [0] * (piece // 10_000) + ([10_000 - piece % 10_000] if piece % 10_000 else [])
    return len(room)


def _pieces(config: Config, resource: Resource) -> list[float]:
    """What each part reserves."""

    def of(section: Section, count: int = 1) -> list[float]:
        return [float(getattr(section, resource))] * count

    # A feeder reserves none, and an evaluation needs its rewards; whether there is one is not looked up here.
    sampling = [] if config.offline else of(config.rollout, config.rollout.workers)
    rewards = [piece for reward in _served(config) for piece in of(reward, reward.replicas)]
    return [*of(config.learner, config.learner.ranks), *sampling, *of(config.eval), *rewards]


def replicas_to_come(config: Config) -> int:
    """Replicas that load may bring beyond those a run starts with."""
    return sum((reward.max_replicas or reward.replicas) - reward.replicas for reward in _served(config))


def at_max_replicas(config: Config, resource: Resource) -> tuple[float, str]:
    """What is reserved when load has brought every reward to its `max_replicas`, and how that adds up.

    Returns:
        The sum, and its text such as "3.5 + ocr 4 x 0.5 = 5.5 CPUs"; `reserved` and an empty text where no
        reward grows by that resource.
    """
    start, terms = reserved(config, resource), []
    total = start
    for reward in _served(config):
        more, each = (reward.max_replicas or reward.replicas) - reward.replicas, getattr(reward, resource)
        if more * each:
            total += more * each
            terms.append(f"{reward.name} {more} x {each:g}")
    return total, f"{' + '.join([f'{start:g}', *terms])} = {total:g} {UNITS[resource]}" if terms else ""


def no_room_to_grow(config: Config, there: Mapping[Resource, float]) -> list[str]:
    """A line for each resource that cannot hold every reward at its `max_replicas`.

    Args:
        there: what the cluster has; a resource that is not in it is not looked at.
    """
    lines = []
    for resource, has in there.items():
        total, sum_text = at_max_replicas(config, resource)
        if sum_text and total > has:
            lines.append(f"at max_replicas the run reserves {sum_text}, and there are {has:g}")
    return lines


def _served(config: Config) -> list[RewardConfig]:
    return [reward for reward in config.rewards if reward.app is not None]


def own_cpus(config: Config) -> int:
    """CPUs that a Ray started on this machine is told it has: a laptop may be oversubscribed, by what a run
    reserves from its start."""
    return max(os.cpu_count() or 1, math.ceil(reserved(config, "num_cpus")))


def learner_backend(config: Config) -> str | None:
    """What the learner's ranks talk over: gloo on the CPU, NCCL between GPUs where each has one of its own.

    None for one rank, which talks to nobody.
    """
    if config.learner.ranks == 1:
        return None
    # NCCL refuses two ranks on one GPU, which is where fractions of one may be placed.
    own_gpu = config.learner.num_gpus >= 1 and config.model.device != "cpu"
    return "cpu:gloo,cuda:nccl" if own_gpu else "gloo"


@contextmanager
def ray_cluster(config: Config) -> Iterator[bool]:
    """Ray is initialised inside the block; yields whether it was started here and ends with the block.

    Uses the Ray that this process has already initialised, and leaves it; else joins `cluster.address` or
    RAY_ADDRESS; without either, starts Ray on this machine with as many CPUs as it has, or as the run
    reserves if that is more (a laptop may be oversubscribed, a cluster may not).

    Raises:
        ConfigError: the cluster has several nodes, and the run would start parts that they cannot reach; or
            the run reserves more GPUs than this machine has.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield False
        return
    address = cluster_address(config)
    if address:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        nodes = sum(node["Alive"] for node in ray.nodes())
        if nodes > 1 and (local := loopback_parts(config)):
            ray.shutdown()
            raise ConfigError(
                f"the Ray cluster at {address} has {nodes} nodes, and these would listen on one loopback "
                f"only: {', '.join(local)}; give the run their addresses (queue.url, rewards[].url)"
            )
    else:
        # Ray starts its workers at nice 15: beside anything else on two cores they would starve.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # One machine is not taken away piece by piece; the watcher is a process more to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        _start(config)
        here, asked = ray.cluster_resources().get("GPU", 0.0), reserved(config, "num_gpus")
        if (taken := whole_gpus(config)) > here:
            ray.shutdown()
            parts = f" in parts that take {taken} whole ones" if taken > asked else ""
            raise ConfigError(
                f"the run reserves {asked:g} GPUs{parts}, this machine has {here:g}: lower num_gpus "
                "of rollout, learner, eval or rewards, or join a cluster (cluster.address)"
            )
    _tell_of_room(config)
    try:
        yield not address
    finally:
        ray.shutdown()


def _tell_of_room(config: Config) -> None:
    """Warn of what does not fit now: a cluster that grows may hold it later, one that does not never will."""
    import ray

    has = ray.cluster_resources()
    there: dict[Resource, float] = {"num_cpus": has.get("CPU", 0.0), "num_gpus": has.get("GPU", 0.0)}
    for resource, amount in there.items():
        if (asked := reserved(config, resource)) > amount:
            logger.warning(
                "the run reserves %g %s, the cluster has %g now: parts wait for it to grow, %g s at most "
                "(cluster.start_deadline_s)",
                *(asked, UNITS[resource], amount, config.cluster.start_deadline_s),
            )
        elif told := no_room_to_grow(config, {resource: amount}):
            logger.warning("%s; %s", told[0], GROWTH_REMEDY)


def cluster_address(config: Config) -> str | None:
    """The Ray cluster to join; None to start Ray on this machine."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def loopback_parts(config: Config) -> list[str]:
    """What this run would start where only the driver's own machine reaches it."""
    rewards = [f"reward {reward.name}" for reward in config.rewards if reward.app is not None]
    if config.offline and not evaluates(config):
        rewards = []
    return (["the queue"] if config.queue.url is None else []) + rewards


@retry(stop=stop_after_attempt(STARTS), before_sleep=lambda _: _clean_up(), reraise=True)
def _start(config: Config) -> None:
    """Start Ray here; again when the machine is so busy that Ray gives up on itself after 30 s."""
    with _children_in_their_own_group():
        start_on_loopback(
            own_cpus(config),
            object_store_bytes=config.cluster.object_store_mb * 1024**2,
            namespace=NAMESPACE,
            include_dashboard=config.cluster.dashboard,
            logging_level=logging.ERROR,
        )


def start_on_loopback(num_cpus: int, *, object_store_bytes: int, **options: Any) -> None:
    """Start a Ray on this machine that nobody beyond it reaches.

    Args:
        options: of `ray.init`.
    """
    import ray

    with _on_loopback():
        ray.init(
            **{
                "address": "local",
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "dashboard_host": "127.0.0.1",
                "_node_ip_address": "127.0.0.1",
                "object_store_memory": object_store_bytes,
                "log_to_driver": False,
                **options,
            }
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started inside the block, and all that it starts later, listens on loopback only.

    Ray takes 127.0.0.1 for the machine's address otherwise, and listens on every interface, whatever address
    it is given; the variable is the one it has for laptops with firewalls.
    """
    from ray._private import ray_constants

    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    in_environment = os.environ.get(variable)
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if in_environment is None:
            del os.environ[variable]
        else:
            os.environ[variable] = in_environment


@contextmanager
def _children_in_their_own_group() -> Iterator[None]:
    """Every process started inside the block leads a process group. Ray has no setting for that."""
    start = subprocess.Popen.__init__

    def detached(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{"process_group": 0, **kwargs})

    subprocess.Popen.__init__ = detached  # type: ignore[method-assign]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = start  # type: ignore[method-assign]


def _clean_up() -> None:
    import ray

    ray.shutdown()
