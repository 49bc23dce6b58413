"""Joining a Ray cluster, or starting one on loopback for a single machine.

Promises
- A Ray that this run starts is shut down with it, and listens on loopback alone.
- It asks every client for a token: Ray's own default, which RAY_AUTH_MODE=disabled would switch off.
- A signal to this process and its group (Ctrl-C, `timeout`, `kill -- -PGID`) does not reach the Ray that it
  started: the driver ends it when everything has been drained.
- Usage statistics stay off: nothing is sent anywhere.
- Parts that only this machine would reach are refused on a cluster of several nodes.

Whether a cluster can hold a run: services/cluster_room.py.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tenacity import retry, stop_after_attempt

from services.config import Config
from services.config_file import ConfigError
from services.demands import reserved
from services.prompts import evaluates

logger = logging.getLogger(__name__)

NAMESPACE = "dgpo"
POLICY_STORE = "policy-store"
"""The part that knows who has which weights."""
STARTS = 3


def own_cpus(config: Config) -> int:
    """CPUs that a Ray started on this machine is told it has: a laptop may be oversubscribed, by what a run
    reserves from its start."""
    return max(os.cpu_count() or 1, math.ceil(reserved(config, "num_cpus")))


def actor_name(run: str, part: str) -> str:
    """By which Ray knows a part of a run, in NAMESPACE."""
    return f"{run}/{part}"


def learner_backend(config: Config) -> str | None:
    """What the learner's ranks talk over: gloo on the CPU, NCCL between GPUs where each has one of its own.

    None for one rank, which talks to nobody.
    """
    if config.learner.ranks == 1:
        return None
    # NCCL refuses two ranks on one GPU, which is where fractions of one may be placed.
    own_gpu = config.learner.num_gpus >= 1 and config.model.device != "cpu"
    return "cpu:gloo,cuda:nccl" if own_gpu else "gloo"


def nccl_listens_where_ray_does() -> None:
    """By itself NCCL takes any interface but loopback. For a process on Ray that has not used it yet.

    NCCL_SOCKET_IFNAME stays as it is where it is set.
    """
    import psutil
    import ray

    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == here for address in addresses):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


@contextmanager
def ray_cluster(config: Config, *, queue: bool = True) -> Iterator[bool]:
    """Ray is initialised inside the block; yields whether it was started here and ends with the block.

    Uses the Ray that this process has already initialised, and leaves it; else joins `cluster.address` or
    RAY_ADDRESS; without either, starts Ray on this machine with as many CPUs as it has, or as the run
    reserves if that is more (a laptop may be oversubscribed, a cluster may not).

    Args:
        queue: whether what runs inside has one.

    Raises:
        ConfigError: the cluster has several nodes, and the run would start parts that they cannot reach.
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
        if nodes > 1 and (local := loopback_parts(config, queue=queue)):
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
    try:
        yield not address
    finally:
        ray.shutdown()


def cluster_address(config: Config) -> str | None:
    """The Ray cluster to join; None to start Ray on this machine."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def loopback_parts(config: Config, *, queue: bool = True) -> list[str]:
    """What this run, or with no `queue` this evaluation, would start where only the driver's own machine
    reaches it."""
    rewards = [f"reward {reward.name}" for reward in config.rewards if reward.app is not None]
    if config.offline and not evaluates(config):
        rewards = []
    return (["the queue"] if queue and config.queue.url is None else []) + rewards


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
