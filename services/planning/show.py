"""A plan as people and programs read it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from services.planning.cost import RATE
from services.planning.plan import Plan

ONE_GPU = "a second GPU: sampling and training then go on at the same time"
ADVICE = {
    "rollout": "more rollout workers, or fewer solver steps",
    "learner": "more learner ranks (at most one a group of an update)",
    "rewards": "more replicas, fewer images_per_request, or a faster scorer",
    "proxy": "serve rewards elsewhere, behind several proxies (rewards[].url), or take fewer",
    "queue": "fewer or smaller groups, or a faster server",
    "turnaround": "a higher queue.max_staleness, or smaller groups: workers wait for updates",
}


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in the table, in seconds, bytes and GiB."""
    costs, split = plan.costs, plan.split
    moved = costs.traffic(split)
    return {
        "model": costs.model.hub,
        "gpus": plan.gpus,
        "idle": plan.idle,
        "split": {
            "workers": split.workers,
            "ranks": split.ranks,
            "reward_gpus": split.reward_gpus,
            "replicas": dict(split.replicas),
            "colocated": split.colocated,
        },
        "seconds": plan.step.seconds,
        "bottleneck": plan.step.bottleneck,
        "bounds": dict(plan.step.parts),
        "update": {
            "images": costs.work.images,
            "groups": costs.shape.groups,
            "group_size": costs.config.rollout.group_size,
            "max_staleness": costs.shape.staleness,
            "rollout_gpu_s": costs.rollout_gpu_s,
            "learner_gpu_s": costs.learner_gpu_s,
            "learner_reading_s": moved.take_s,
            "reward_gpu_s": costs.reward_s(on_gpu=True),
            "reward_cpu_s": costs.reward_s(on_gpu=False),
        },
        "bytes": {
            "group": moved.group,
            "queue": moved.queue,
            "images": moved.images,
            "weights": moved.weights,
            "network": moved.network,
        },
        "gib": asdict(costs.memory),
        "rewards": [asdict(one) for one in costs.rewards],
        "assumed": {
            "tflops": costs.machine.rate / 1e12,
            "gpu_gib": costs.machine.gpu_gib,
            "network_gbit": costs.machine.network_bytes_s * 8 / 1e9,
            "node_gpus": costs.machine.node_gpus,
        },
        "measured": {
            "queue_mb_s": costs.machine.queue_bytes_s / 1e6,
            "queue_groups_s": costs.machine.queue_groups_s,
            "proxy_mb_s": costs.machine.proxy_bytes_s / 1e6,
        },
        "notes": list(plan.notes),
    }


def shown(plan: Plan) -> Group:
    costs, split, step = plan.costs, plan.split, plan.step
    machine, moved = costs.machine, costs.traffic(split)
    said = "assumed, not measured" if machine.rate == RATE else "given"
    update = Table(
        title=f"{costs.model.hub}: an update of {costs.shape.groups} groups x "
        f"{costs.config.rollout.group_size} images",
        title_justify="left",
    )
    for heading in ("part", "of an update", "there are", "takes s"):
        update.add_column(heading, justify="left" if heading == "part" else "right")
    has = "one GPU, in turns" if split.colocated else ""
    update.add_row(
        "rollout",
        f"{costs.rollout_gpu_s:.1f} GPU-s",
        has or _count(split.workers, "worker"),
        _s(step.parts["rollout"]),
    )
    update.add_row(
        "learner",
        f"{costs.learner_gpu_s:.1f} GPU-s",
        has or _count(split.ranks, "rank"),
        _s(step.parts["learner"]),
    )
    for one in costs.rewards:
        total = costs.shape.groups * costs.group_score_s(one)
        where = "GPU" if one.on_gpu else "CPU"
        replicas = split.replicas[one.name]
        told = "unknown" if one.seconds is None else f"{total:.1f} {where}-s"
        update.add_row(f"reward {one.name}", told, _count(replicas, "replica"), _s(total / replicas))
    update.add_row("images to rewards", f"{moved.images / 1e6:.0f} MB", "1 proxy", _s(step.parts["proxy"]))
    update.add_row("queue", f"{moved.queue / 1e6:.0f} MB in, and out", "1 server", _s(step.parts["queue"]))
    update.add_row("turnaround", f"max_staleness {costs.shape.staleness}", "", _s(step.parts["turnaround"]))
    update.add_row(
        "weights",
        f"{moved.weights / 1e6:.0f} MB a version",
        "in rollout and learner",
        f"{_s(moved.publish_s)} + {_s(moved.install_s)}",
    )
    update.add_row("network", f"{moved.network / 1e6:.0f} MB", "", "")
    advice = ONE_GPU if split.colocated else ADVICE[step.bottleneck]
    if step.bottleneck == "learner" and costs.reading_leads(split):
        advice = "reading groups: fewer or smaller ones, or a faster server"
    lines = [
        f"{_count(plan.gpus, 'GPU')}: {step.seconds:.1f} s an update, "
        f"{costs.work.images / step.seconds:.1f} images/s; "
        f"bottleneck: {step.bottleneck} ({advice})",
        _settings(plan),
        f"A GPU does {machine.rate / 1e12:g} TFLOP/s ({said}; dgpo bench gpu measures it, --tflops takes "
        f"it), a node has {machine.node_gpus} GPUs and {machine.network_bytes_s * 8 / 1e9:g} Gbit/s "
        f"(assumed); the queue's server does {machine.queue_bytes_s / 1e6:.0f} MB/s and "
        f"{machine.queue_groups_s:.0f} groups/s "
        f"(dgpo bench load, soak: on two cores), Serve's proxy {machine.proxy_bytes_s / 1e6:.0f} MB/s (dgpo "
        "reward bench proxy, likewise). Not in it: text encoders, VAE, checkpoints, evaluations.",
        *(
            f"Reward {one.name}: {_each(one.seconds)} an image, {one.source}."
            for one in costs.rewards
            if one.seconds
        ),
        *(f"Note: {note}." for note in plan.notes),
    ]
    return Group(update, *(Text(line) for line in lines))


def _settings(plan: Plan) -> str:
    split = plan.split
    if split.colocated:
        return "All parts share the GPU: rollout.workers 1, learner.ranks 1, num_gpus of all adds up to 1."
    where, on_gpu = "", any(one.on_gpu for one in plan.costs.rewards)
    if split.reward_gpus:
        what = "rewards" if on_gpu else "the evaluator"
        where = f"; beside them {_count(split.reward_gpus, 'GPU')} for {what}"
    elif on_gpu:
        where = "; rewards on a GPU share the workers': rollout.num_gpus 0.8, say, and 0.1 a replica"
    return f"--set rollout.workers={split.workers} --set learner.ranks={split.ranks}{where}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _s(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def _each(seconds: float | None) -> str:
    return f"{(seconds or 0) * 1e3:.1f} ms"
