"""Whether the Ray cluster that was joined can hold a run: refused, waited for, or gone on with.

Promises
- What can never fit is refused with its arithmetic before any part is started: at once, or where
  `cluster.wait_s` says that the cluster grows, when that time has passed.
- While it waits, Ray's autoscaler knows what for: a placement group of all pieces, which goes with the wait,
  and with the driver if that dies.
- What fits the cluster and is taken by others is not refused: parts wait for it, `cluster.start_deadline_s`.
- Replicas that load alone brings (`max_replicas`) need not fit: that is a warning.

The arithmetic itself is in services/demands.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, SchedulingStrategyT

from services.config import Config, RolloutConfig
from services.config.placement import needs_of
from services.config_file import ConfigError
from services.demands import (
    GROWTH_REMEDY,
    Demand,
    Node,
    Resource,
    Shortfall,
    no_room_to_grow,
    shortfalls,
)

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
TELL_EVERY_S = 5.0
PLAN_S = 5
"""For a plan of places, which Ray makes in milliseconds where there is room now."""


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that Ray is initialised for."""
    return [Node(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def nodes_at(address: str) -> list[Node]:
    """The nodes of the cluster at `host:port`, for one who does not join it.

    Raises:
        RayError: it does not answer, or refuses this process's token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    alive = 0  # of ray.core.generated.gcs_pb2.GcsNodeInfo
    found = GcsClient(address=address).get_all_node_info().values()
    return [Node(dict(node.resources_total)) for node in found if node.state == alive]


def require_room(
    config: Config,
    asked: Sequence[Demand],
    *,
    own_ray: bool,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Returns when the cluster can hold all of this.

    Args:
        own_ray: Ray is this machine's alone, which does not grow.
        tell: what is waited for, every few seconds; may raise to end the wait.

    Raises:
        ConfigError: it cannot, and does not grow, or did not in time.
    """
    where = "this machine" if own_ray else "the cluster"
    wait_s = 0.0 if own_ray else config.cluster.wait_s
    short = shortfalls(asked, cluster_nodes(), where)
    if short and wait_s:
        short = _wait(asked, wait_s, tell)
    if short:
        sums = "; ".join(one.text for one in short)
        raise ConfigError(f"there is no room for the run: it {sums}{_remedy(own_ray, wait_s)}")
    has = ray.cluster_resources()
    there: dict[Resource, float] = {"num_cpus": has.get("CPU", 0.0), "num_gpus": has.get("GPU", 0.0)}
    for line in no_room_to_grow(config, there):
        logger.warning("%s; %s", line, GROWTH_REMEDY)


def _remedy(own_ray: bool, wait_s: float) -> str:
    lower = "lower workers, ranks or replicas, or what each reserves"
    if own_ray:
        return f". Either {lower}, or join a cluster (cluster.address)"
    grows = ", or, for a cluster that grows by itself, set cluster.wait_s"
    waited = f" after {wait_s:g} s (cluster.wait_s)" if wait_s else ""
    return f"{waited}. Either {lower}, or add nodes{'' if wait_s else grows}"


def _wait(asked: Sequence[Demand], wait_s: float, tell: Callable[[str], None]) -> list[Shortfall]:
    """What is still missing at the end."""
    started, told_at, told = time.monotonic(), float("-inf"), ""
    with _autoscaler_asked(asked):
        while short := shortfalls(asked, cluster_nodes()):
            waited = time.monotonic() - started
            if waited >= wait_s:
                return short
            missing = ", ".join(one.missing for one in short)
            sums = "; ".join(one.text for one in short)
            if sums != told or waited - told_at >= TELL_EVERY_S:
                logger.info("waiting for %s: the run %s; %.0f of %g s", missing, sums, waited, wait_s)
                tell(f"waiting for {missing}: {sums}; {waited:.0f} of {wait_s:g} s")
                told_at, told = waited, sums
            time.sleep(min(LOOK_EVERY_S, wait_s))
    return []


@contextmanager
def _autoscaler_asked(asked: Sequence[Demand]) -> Iterator[None]:
    """Ray's autoscaler is asked for all of this inside the block.

    By a group that waits for its place and not by `request_resources`: that would take the place of what
    others have requested, and outlive a driver that is killed.
    """
    bundles = [dict(demand.each) for demand in asked for _ in range(demand.count)]
    group = placement_group(bundles, strategy="PACK")
    try:
        yield
    finally:
        remove_placement_group(group)


class WorkerPlaces:
    """Where the rollout workers of a run are made: as planned in their first life, later where Ray has room.

    Ray plans the places as a group (`rollout.placement`), and the group is given back: it would keep the
    place of a worker that `dgpo scale` sends away, and hold a new one to a node that is gone
    (docs/decisions/0011).
    """

    def __init__(self, config: Config) -> None:
        self._rollout = config.rollout
        self._planned: dict[int, SchedulingStrategyT] = {}

    def plan(self, count: int) -> None:
        """For the workers that a run starts with, right before they are made.

        Nothing is planned on one node, for workers that reserve nothing, or without room for all of them now.
        """
        each = needs_of(self._rollout)
        if len(cluster_nodes()) < 2 or not each:
            return
        group = placement_group([each] * count, strategy=self._rollout.placement.upper())
        try:
            if group.wait(PLAN_S):
                nodes = placement_group_table(group)["bundles_to_node_id"]
                # Soft: where that node is gone by then, another one.
                self._planned = {
                    index: NodeAffinitySchedulingStrategy(nodes[index], soft=True) for index in range(count)
                }
            else:
                logger.info("no room for %d workers at once now: each goes where there is some", count)
        finally:
            remove_placement_group(group)

    def next(self, index: int) -> SchedulingStrategyT:
        """Of the worker that is about to be made."""
        return self._planned.pop(index, unplanned(self._rollout))


def unplanned(rollout: RolloutConfig) -> SchedulingStrategyT:
    """Where a sampling process goes by itself."""
    return "SPREAD" if rollout.placement == "spread" else "DEFAULT"
