"""Bytes: of a group in the queue, of a version of the weights, over the network; and what carries so many.

Measured figures name the command; what is assumed says so, and is an option of `dgpo plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from services.config import Config
from services.planning.cost import RATE
from services.planning.published import PassCost, Published

HEADER_BYTES = 1024
"""Of a group: its JSON and the names of its tensors, about."""
SAMPLE_HEADER_BYTES = 48
"""Of each sample in it: its seed, its scores and their details, about."""
PUBLISH_BYTES_S = 75e6 / 0.028
"""`dgpo bench weights`, docs/weights.md: 75 MB published in 28 ms."""
INSTALL_BYTES_S = 8 * 75e6 / 0.040
"""The same: eight workers of one node had them 40 ms later."""
NVLINK_BYTES_S = 100e9
"""Between GPUs of a node, a direction: assumed, about a quarter of NVLink's of an H100."""


@dataclass(frozen=True)
class Machine:
    """What a plan assumes of the machines; nothing of it is measured but the queue's limits."""

    rate: float = RATE
    """FLOP/s of a GPU."""
    gpu_gib: float = 74.0
    """That tensors may take of a GPU: one of 80 GB has 74.5 GiB."""
    network_bytes_s: float = 1.25e9
    """Of a node, in each direction: 10 Gbit/s."""
    node_gpus: int = 8
    queue_bytes_s: float = 303e6
    """`dgpo bench load`, docs/fault-tolerance.md: 100.9 groups/s of 3 MB, server, learner and 512 workers on
    two cores together; a server with cores of its own does more."""
    queue_groups_s: float = 1600.0
    """`dgpo bench soak`, docs/fault-tolerance.md: 50,000 small groups in 30 s, likewise on two cores."""
    proxy_bytes_s: float = 258e6
    """Images through the proxy of the Serve that a run starts: `dgpo reward bench proxy`, docs/rewards.md,
    on two cores that client and server shared."""


@dataclass(frozen=True)
class Traffic:
    """Of an update, in bytes but for the seconds."""

    group: int
    """One whole group, encoded."""
    queue: int
    """Into the queue's server, and as many out of it."""
    images: float
    """Through the proxy of the run's own Serve, to all rewards that are behind it."""
    weights: int
    """One version."""
    network: float
    """Between nodes: groups in and out, to the ranks, gradients, weights to all that fetch them."""
    install_s: float
    take_s: float
    gather_s: float
    publish_s: float
    queue_s: float
    proxy_s: float


def group_bytes(config: Config, model: Published) -> int:
    """Of a group as services/codec.py encodes it: float32 latents of G samples and the condition of one."""
    samples, section = config.rollout.group_size, config.model
    widths = model.family.condition_widths(model.config)
    condition = model.text_tokens * widths["prompt_embeds"] + widths.get("pooled", 0)
    return (
        samples * (model.latents(section.height, section.width) * 4 + SAMPLE_HEADER_BYTES)
        + condition * (2 if section.dtype == "bfloat16" else 4)
        + HEADER_BYTES
    )


def image_bytes(config: Config, seen: Mapping[str, float]) -> float:
    """Of a group, RGB, once for each reward that the run serves; one with a `url` is served elsewhere.

    Args:
        seen: reward -> share of the groups that it looks at.
    """
    one = config.rollout.group_size * config.model.height * config.model.width * 3
    return one * sum(seen[reward.name] for reward in config.rewards if reward.app is not None)


def weights_bytes(config: Config, cost: PassCost) -> int:
    """Of a version, as it is published."""
    return cost.trained * (2 if config.learner.publish_dtype == "bfloat16" else 4)


def traffic(
    config: Config,
    model: Published,
    cost: PassCost,
    machine: Machine,
    seen: Mapping[str, float],
    *,
    workers: int,
    ranks: int,
) -> Traffic:
    """Of an update with so many workers and ranks. One node has no network: its memory carries all.

    Args:
        seen: as of `image_bytes`.
    """
    images = config.learner.groups_per_step * image_bytes(config, seen)
    groups, one, weights = (
        config.learner.groups_per_step,
        group_bytes(config, model),
        weights_bytes(config, cost),
    )
    nodes = math.ceil((workers + ranks) / machine.node_gpus)
    # A node fetches a version from the object store once; by the other ways each worker does.
    through_store = config.learner.publish_through == "object_store"
    receivers = math.ceil(workers / machine.node_gpus) if through_store else workers
    remote = receivers if nodes > 1 else 0
    local = min(workers, machine.node_gpus) * weights / INSTALL_BYTES_S
    gradients = 2 * (ranks - 1) / ranks * cost.trained * 4 * config.learner.optimizer_steps
    between = ranks > machine.node_gpus
    shares = groups * one * (ranks - 1) / ranks
    across = machine.network_bytes_s if nodes > 1 else NVLINK_BYTES_S
    ring = machine.network_bytes_s if between else NVLINK_BYTES_S
    rings = math.ceil(ranks / machine.node_gpus) if between else 0
    return Traffic(
        group=one,
        queue=groups * one,
        images=images,
        weights=weights,
        network=(2 * groups * one + remote * weights + rings * gradients + shares) if nodes > 1 else 0.0,
        install_s=local + remote * weights / machine.network_bytes_s,
        take_s=groups * one / machine.queue_bytes_s + shares / across,
        gather_s=gradients / ring if ranks > 1 else 0.0,
        publish_s=weights / PUBLISH_BYTES_S,
        queue_s=max(groups * one / machine.queue_bytes_s, groups / machine.queue_groups_s),
        proxy_s=images / machine.proxy_bytes_s,
    )
