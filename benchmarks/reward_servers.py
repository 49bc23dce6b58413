"""What the reward benchmarks measure: one process of `dgpo reward serve`, or replicas of Ray Serve."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from reward_servers.client import RewardClient
from services.ray_runtime import start_on_loopback

TOKEN_ENV = "DGPO_BENCH_REWARD_TOKEN"
DEADLINE_S = 120.0
APPLICATION = "bench"


@dataclass(frozen=True)
class Served:
    """A reward server that answers."""

    url: str
    token: str
    pid: int = 0
    """Its process, where it is one alone."""

    def client(self) -> RewardClient:
        """The typed client: asks again when it is shed."""
        return RewardClient("bench", self.url, self.token, DEADLINE_S)

    def session(self) -> httpx.Client:
        """Bare HTTP with the token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=DEADLINE_S, trust_env=False)


@contextmanager
def alone(app: str, args: dict[str, Any], *, max_pending: int = 64) -> Iterator[Served]:
    """`dgpo reward serve APP`, in a process of its own."""
    token = os.environ.setdefault(TOKEN_ENV, secrets.token_urlsafe(32))
    command = [sys.executable, "-m", "services.cli", "reward", "serve", app, "--args", json.dumps(args)]
    command += ["--port", "0", "--token-env", TOKEN_ENV, "--max-pending", str(max_pending), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        said = process.stdout.readline() if process.stdout else ""
        if not said:
            raise RuntimeError(f"{' '.join(command)}: did not start; exit code {process.wait(DEADLINE_S)}")
        yield Served(json.loads(said)["url"], token, process.pid)
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@contextmanager
def ray_serve(cpus: int) -> Iterator[str]:
    """Ray and Serve's proxy on loopback; yields its address."""
    os.environ.setdefault(TOKEN_ENV, secrets.token_urlsafe(32))
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import logging

    import ray

    from reward_servers.launch import LOOPBACK, start_serve, stop_rewards

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    start_on_loopback(cpus, object_store_bytes=200 * 1024**2, logging_level=logging.ERROR)
    try:
        yield start_serve(LOOPBACK, 0, deadline_s=DEADLINE_S, request_timeout_s=DEADLINE_S)
    finally:
        stop_rewards()
        ray.shutdown()


@contextmanager
def replicas(
    base: str, app: str, args: dict[str, Any], scale: dict[str, Any], *, max_pending: int = 64
) -> Iterator[Served]:
    """An application of Serve.

    Args:
        scale: options of the deployment, such as `autoscaling_config`.
    """
    from ray import serve

    from reward_servers.deployment import deployment_of
    from reward_servers.server_config import ServerConfig

    config = ServerConfig(
        app=app, args=args, token_env=TOKEN_ENV, max_pending=max_pending, deadline_s=DEADLINE_S
    )
    # The replicas wait or share two cores as it comes: none is to be kept from starting.
    deployment = deployment_of(config).options(ray_actor_options={"num_cpus": 0.01}, **scale)
    serve.run(deployment.bind(config.model_dump(mode="json")), name=APPLICATION, route_prefix="/bench")
    try:
        yield Served(f"{base}/bench", os.environ[TOKEN_ENV])
    finally:
        serve.delete(APPLICATION)


class Load:
    """Clients that each ask again as soon as they are answered, until the block ends."""

    def __init__(
        self, served: Served, clients: int, images: NDArray[np.uint8], prompts: str | list[str]
    ) -> None:
        self._client = served.client()
        self._ask: Callable[[], Any] = lambda: self._client.score(images, prompts)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        self._images = len(images)
        self._ends: list[tuple[float, float]] = []
        self._failures: list[BaseException] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self._client.close()
        if self._failures:
            raise self._failures[0]

    def measure(self, seconds: float) -> tuple[float, list[float]]:
        """Images a second over the next `seconds`, and the seconds of each request that ended in them."""
        started = time.perf_counter()
        time.sleep(seconds)
        until = time.perf_counter()
        with self._lock:
            took = [took for end, took in self._ends if started <= end <= until]
        return len(took) * self._images / (until - started), took

    def _run(self) -> None:
        while not self._stopped.is_set():
            asked = time.perf_counter()
            try:
                self._ask()
            except Exception as error:
                self._failures.append(error)
                return
            answered = time.perf_counter()
            with self._lock:
                self._ends.append((answered, answered - asked))
