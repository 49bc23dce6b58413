"""Replicas that follow the load, with a scorer that waits: what two cores can show of many GPUs.

The policy is that of every reward (reward_servers/deployment.py `autoscaling`) but for its delays, which are
shortened: how soon replicas come and go here is not how soon they do in a run.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np

from benchmarks.reward_servers import APPLICATION, DEADLINE_S, Load, ray_serve, replicas
from benchmarks.timed_scorer import TIMED

TARGET: Final = 0.9
"""Share of N times one replica's rate that N replicas must reach."""
IMAGES: Final = 4
"""Of a request."""
SETTLING_S: Final = 2.0
SHORTENED: Final = {
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 5,
}
"""In place of those delays: a minute of waiting measures nothing."""


def scaling(most: int, image_s: float, pass_s: float) -> dict[str, Any]:
    """Replicas from 1 to `most` and back, and images a second at both ends.

    Two clients keep one replica busy, one request in the scorer and one waiting, and no more. Then four a
    replica come; then none is left.
    """
    images = np.zeros((IMAGES, 8, 8, 3), np.uint8)
    from reward_servers.deployment import autoscaling

    policy = autoscaling(1, most)
    scale = {"num_replicas": "auto", "autoscaling_config": policy | SHORTENED}
    arguments = {"image_s": image_s, "max_batch": IMAGES}
    with ray_serve(cpus=most) as base, replicas(base, TIMED, arguments, scale) as served:
        with Load(served, 2, images, "p") as load:
            load.measure(SETTLING_S)
            one, _ = load.measure(2 * pass_s)
            if (found := running()) != 1:
                raise RuntimeError(f"{found} replicas for the load of one")
        with Load(served, 4 * most, images, "p") as load:
            up_s = _until(most)
            load.measure(SETTLING_S)
            rate, took = load.measure(2 * pass_s)
        down_s = _until(1)
    return {
        "image_s": image_s,
        "images": IMAGES,
        "replicas": most,
        "one_images_s": one,
        "most_images_s": rate,
        "ratio": rate / (most * one),
        "target": TARGET,
        "met": rate >= TARGET * most * one,
        "up_s": up_s,
        "down_s": down_s,
        "delays_s": {name: [SHORTENED[name], policy[name]] for name in SHORTENED},
        "p50_s": float(np.percentile(took, 50)),
        "p99_s": float(np.percentile(took, 99)),
    }


def running() -> int:
    """Replicas that take requests."""
    from ray import serve

    states = serve.status().applications[APPLICATION].deployments["reward"].replica_states
    return sum(count for state, count in states.items() if getattr(state, "value", state) == "RUNNING")


def _until(count: int) -> float:
    """Seconds until so many replicas run."""
    started = time.perf_counter()
    while (found := running()) != count:
        if time.perf_counter() - started > DEADLINE_S:
            raise RuntimeError(f"{found} replicas after {DEADLINE_S:g} s, expected {count}")
        time.sleep(0.1)
    return time.perf_counter() - started
