"""A group in several requests at once: how much sooner replicas of Ray Serve have scored it, by who routes.

With a scorer that waits, so that two cores can show it, and a fixed number of replicas: all alike, or one of
them half as fast. Beside what is measured stands what it would be if no request waited for a busy replica
while another one is idle: that is how `dgpo plan` reckons.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.reward_servers import DEADLINE_S, TOKEN_ENV, Served, ray_serve, replicas
from benchmarks.timed_scorer import TIMED
from rollout_workers.scoring import RewardServers
from services.config import RewardConfig
from services.context import RewardPlace, SecretPlace
from services.messages import Prompt

GROUP: Final = 24
SIZES: Final = (None, 6, 4)
"""Images a request; None: the group in one."""
ROUTERS: Final = {
    "ours": "reward_servers.router.FewestRequests",
    "Serve's own": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "round robin": "ray.serve.experimental.round_robin_router:RoundRobinRouter",
}


def division(count: int, image_s: float, passes: int) -> dict[str, Any]:
    """Seconds a group: of one worker that asks alone, of as many workers as replicas, and where one is slow.

    Args:
        count: replicas.
        image_s: seconds that the scorer waits an image.
        passes: groups of each worker, each size and router.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for router, place in ROUTERS.items():
            # A Serve for each: its proxy keeps the router of an application for the next one of that name.
            with ray_serve(cpus=count) as base:
                for mark in (None, Path(folder) / router):
                    with _replicas(base, count, place, image_s, mark) as served:
                        rows += [
                            {"router": router, **row}
                            for row in _rows(served, count, image_s, passes, slow=mark is not None)
                        ]
    return {"images": GROUP, "replicas": count, "image_s": image_s, "passes": passes, "rows": rows}


def _replicas(
    base: str, count: int, router: str, image_s: float, slow: Path | None
) -> AbstractContextManager[Served]:
    from ray.serve.config import RequestRouterConfig

    arguments = {"image_s": image_s, "max_batch": GROUP, "slow": None if slow is None else str(slow)}
    routed = RequestRouterConfig(request_router_class=router)
    return replicas(base, TIMED, arguments, {"num_replicas": count, "request_router_config": routed})


def _rows(served: Served, count: int, image_s: float, passes: int, *, slow: bool) -> Iterator[dict[str, Any]]:
    for workers in (count,) if slow else (1, count):
        for size in SIZES:
            took = _asked(served, size, workers, passes)
            yield {
                "slow": slow,
                "workers": workers,
                "images_per_request": size,
                "mean_s": statistics.mean(took),
                "median_s": statistics.median(took),
                "max_s": max(took),
                "ideal_s": ideal_s(count, workers, size, image_s, slow=slow),
            }


def ideal_s(count: int, workers: int, size: int | None, image_s: float, *, slow: bool) -> float:
    """Mean of a group, each replica having work whenever there is any; a slow one is half a replica."""
    if slow:
        return workers * GROUP * image_s / (count - 0.5)
    size = size or GROUP
    return math.ceil(workers * math.ceil(GROUP / size) / count) * size * image_s


def _asked(served: Served, size: int | None, workers: int, passes: int) -> list[float]:
    """Seconds of each group, but for the first of each worker, which makes its connections."""
    reward = RewardConfig(name="timed", url=served.url, images_per_request=size, deadline_s=DEADLINE_S)
    place = RewardPlace(url=served.url, token=SecretPlace(env=TOKEN_ENV))
    images, prompts = np.zeros((GROUP, 8, 8, 3), np.uint8), [Prompt(text="p")] * GROUP

    def ask(_: int) -> list[float]:
        servers, took = RewardServers([reward], {"timed": place}), list[float]()
        try:
            for _ in range(passes + 1):
                began = time.perf_counter()
                servers.score(images, prompts)
                took.append(time.perf_counter() - began)
        finally:
            servers.close()
        return took[1:]

    with ThreadPoolExecutor(workers) as threads:
        return [seconds for each in threads.map(ask, range(workers)) for seconds in each]
