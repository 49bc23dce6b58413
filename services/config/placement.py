"""What a part reserves on a node of a Ray cluster: types of its settings, and what Ray is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, StringConstraints

ACCELERATOR = "accelerator_type:"
"""Ray's prefix of the resource that a node with such an accelerator has, one of it."""
SHARE_OF_ACCELERATOR = 0.001
"""What Ray takes of that for each part that asks for its type."""

_OWN_KEYS = {
    "CPU": "num_cpus",
    "GPU": "num_gpus",
    "memory": None,
    "object_store_memory": None,
}
"""What Ray takes by another name, and the setting here; None: there is none."""


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name.startswith(ACCELERATOR):
            raise ValueError(
                f"{name} is no custom resource: set accelerator_type to {name[len(ACCELERATOR) :]}"
            )
        if name in _OWN_KEYS:
            key = _OWN_KEYS[name]
            instead = f"set {key}" if key is not None else "no part of a run reserves it; leave it out"
            raise ValueError(f"{name} is no custom resource: {instead}")
        if not name:
            raise ValueError("a custom resource needs a name, as in ray start --resources='{\"pool\": 8}'")
        if amount <= 0:
            raise ValueError(f"{name} {amount:g} must be more than 0; leave it out to reserve none")
    return resources


CustomResources = Annotated[dict[str, float], AfterValidator(_custom)]
"""Name -> amount, of what nodes were started with: `ray start --resources='{"pool": 8}'`."""

AcceleratorType = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Ray's name of an accelerator: of ray.util.accelerators, or what nodes were started with."""

Placement = Literal["pack", "spread"]


class Placed(Protocol):
    """A section of the configuration whose part has a place in the cluster."""

    @property
    def num_cpus(self) -> float: ...
    @property
    def num_gpus(self) -> float: ...
    @property
    def accelerator_type(self) -> str | None: ...
    @property
    def resources(self) -> Mapping[str, float]: ...


def needs_of(part: Placed) -> dict[str, float]:
    """What a piece of a part needs on one node, by Ray's names; nothing that is 0."""
    needs = {"CPU": part.num_cpus, "GPU": part.num_gpus, **part.resources}
    if part.accelerator_type is not None:
        needs[f"{ACCELERATOR}{part.accelerator_type}"] = SHARE_OF_ACCELERATOR
    return {name: float(amount) for name, amount in needs.items() if amount}


def actor_options(part: Placed) -> dict[str, Any]:
    """The same as options of a Ray actor, or of a replica of Serve."""
    options: dict[str, Any] = {"num_cpus": part.num_cpus, "num_gpus": part.num_gpus}
    if part.resources:
        options["resources"] = dict(part.resources)
    if part.accelerator_type is not None:
        options["accelerator_type"] = part.accelerator_type
    return options
