"""What `dgpo doctor` says of the room that a run needs, here or on the cluster that it would join."""

from __future__ import annotations

from services.config import Config
from services.demands import (
    GROWTH_REMEDY,
    UNITS,
    Resource,
    at_max_replicas,
    demands,
    no_room_to_grow,
    shortfalls,
    sums,
)
from services.doctor.finding import Finding
from services.doctor.ray_cluster import ray_findings
from services.doctor.servers import scores_nothing
from services.formatting import reason
from services.ray_runtime import cluster_address, own_cpus


def room_findings(config: Config) -> list[Finding]:
    """Whether the run fits, and whether it fits when every reward has grown."""
    return [*_room(config), *_room_to_grow(config)]


def _room(config: Config) -> list[Finding]:
    """Whether the cluster that a run would join can hold it."""
    address = cluster_address(config)
    if address is None or not all(finding.ok for finding in ray_findings(config)):
        return []
    from ray.exceptions import RayError

    from services.cluster_room import nodes_at

    asked = demands(config, evaluating=not scores_nothing(config))
    what, needs = "room", f"the run needs {sums(asked) or 'nothing of Ray'}"
    if address == "auto" or "//" in address:
        return [Finding(what=what, ok=True, found=needs)]
    try:
        nodes = nodes_at(address)
    except RayError as error:
        told = f"{needs}; {address} does not say what it has: {reason(error)}"
        return [Finding(what=what, ok=True, warning=True, found=told, remedy="see RAY_AUTH_TOKEN")]
    short, wait_s = shortfalls(asked, nodes), config.cluster.wait_s
    found = "; ".join(one.text for one in short) or f"{needs}, and {len(nodes)} nodes have it"
    remedy = "lower workers, ranks or replicas, or what each reserves; add nodes, or set cluster.wait_s"
    if short and wait_s:
        remedy = f"nothing, where the cluster grows by then: the run waits {wait_s:g} s (cluster.wait_s)"
    ok = not short or wait_s > 0
    return [Finding(what=what, ok=ok, warning=bool(short), found=found, remedy=remedy if short else "")]


def _room_to_grow(config: Config) -> list[Finding]:
    """Whether every reward can have its `max_replicas` at once. A run starts without."""
    grown = [text for resource in UNITS if (text := at_max_replicas(config, resource)[1])]
    if not grown or scores_nothing(config):
        return []
    if cluster_address(config) is not None:
        found = f"the run reserves {', '.join(grown)}; a cluster that has less starts fewer"
        return [Finding(what="max_replicas", ok=True, found=found)]
    import torch

    there: dict[Resource, float] = {"num_cpus": own_cpus(config), "num_gpus": torch.cuda.device_count()}
    lines = no_room_to_grow(config, there)
    return [
        Finding(
            what="max_replicas",
            ok=True,
            warning=bool(lines),
            found="; ".join(lines) or f"the run reserves {', '.join(grown)}, and has them here",
            remedy=GROWTH_REMEDY if lines else "",
        )
    ]
