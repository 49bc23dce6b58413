"""What test_placement.py submits to its cluster: a run without room, a run that waits for room, and a plan.

Ray is joined here and not by the run, which refuses an embedded queue and rewards of its own on several
nodes: these are all on one machine.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from ray.util.state import list_actors
from rich.console import Console

from services.cluster_room import WorkerPlaces
from services.config import Config
from services.config_file import ConfigError, load_config
from services.doctor import examine
from services.driver import train
from services.monitor import Outcome
from services.progress import Progress
from services.ray_runtime import NAMESPACE
from services.run_directory import RunDirectory

REFUSED = ("rollout.workers=9", "cluster.wait_s=0")


class Waiting(Progress):
    """Tells of the first wait, and of what Ray knows then of groups that have no place: its autoscaler reads
    the same."""

    told = False

    def activity(self, text: str) -> None:
        super().activity(text)
        if text.startswith("waiting for ") and not self.told:
            self.told = True
            tell(waiting=text, demand=groups("PENDING"))


def started(config: Config) -> Outcome:
    directory = RunDirectory.create(config)
    console = Console(stderr=True)
    with Waiting(directory.name, config.learner.max_steps, console=console) as view:
        return train(config, directory, view)


def groups(state: str) -> list[list[dict[str, float]]]:
    """Bundles of placement groups."""
    found = placement_group_table().values()
    return [list(group["bundles"].values()) for group in found if group["state"] == state]


def actors() -> list[dict[str, Any]]:
    """Of this job and of Serve, the dead among them."""
    keys = ("class_name", "name", "node_id")
    return [{key: getattr(one, key) for key in keys} for one in list_actors(limit=1000)]


def tell(**found: object) -> None:
    print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    overrides = sys.argv[1:]
    # RAY_ADDRESS is set in a job: the doctor asks the cluster, and does not join it.
    examined = examine(load_config("quickstart", [*overrides, *REFUSED]))
    tell(doctor=[finding.found for finding in examined if finding.what == "room" and not finding.ok])
    ray.init(namespace=NAMESPACE, log_to_driver=False)
    try:
        started(load_config("quickstart", [*overrides, *REFUSED]))
    except ConfigError as error:
        tell(refused=str(error))
    outcome = started(load_config("quickstart", [*overrides, "rollout.placement=spread"]))
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    tell(run=outcome.run.name, steps=outcome.version.step, nodes=nodes, actors=actors())
    tell(demand_later=groups("PENDING"))
    packed = WorkerPlaces(load_config("quickstart", [*overrides, "rollout.placement=pack"]))
    packed.plan(2)
    places: list[Any] = [packed.next(index) for index in range(2)]
    tell(packed=[place.node_id for place in places], later=packed.next(0))
