"""A real Ray cluster of one or several nodes on this machine: `ray start` for each, a token, own ports."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from tenacity import retry, retry_if_exception_type, stop_after_attempt

from services.config_file import PROJECT_ROOT
from tests.ports import free_ports

RAY = str(Path(sys.executable).with_name("ray"))
START_S = 90.0
STARTS = 3
TOO_LATE = "timed out during startup"
"""What Ray says of a node that it has waited 30 s for, and ends. On a busy machine another comes in time."""
STARTED = "Ray runtime started."
COMMON = ("--object-store-memory=100000000", "--disable-usage-stats")


class NotInTime(AssertionError):
    """A node has ended by itself, since it took too long to start."""


@dataclass
class Cluster:
    """Its head is there from the start; nodes are added."""

    dashboard: str
    port: int
    folder: Path
    environment: dict[str, str]
    """Of its clients."""
    of_nodes: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add_node(self, *, cpus: int, gpus: int = 0, resources: Mapping[str, float] | None = None) -> None:
        """Returns when it has joined. GPUs are simulated: Ray counts what it is told."""
        amounts = (f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--resources={json.dumps(resources or {})}")
        # One after the other: nodes that start at once on one machine get in each other's way.
        self._start(f"--address=127.0.0.1:{self.port}", "--node-ip-address=127.0.0.1", *amounts)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A `ray` command against it."""
        return subprocess.run(
            [RAY, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={**self.environment, "RAY_ADDRESS": self.dashboard},
            cwd=PROJECT_ROOT,
            check=False,
        )

    @retry(retry=retry_if_exception_type(NotInTime), stop=stop_after_attempt(STARTS), reraise=True)
    def _start(self, *arguments: str) -> None:
        log = self.folder / f"node-{len(self.nodes)}.log"
        # --block and a process group of its own: `ray stop` would stop every Ray of this machine.
        with log.open("wb") as said:
            node = subprocess.Popen(
                [RAY, "start", "--block", "--dashboard-agent-listen-port=0", *arguments, *COMMON],
                env=self.of_nodes,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(node)
        self._wait(lambda: STARTED in log.read_text(), node, log)

    def _wait(self, ready: Callable[[], bool], node: subprocess.Popen[bytes], log: Path) -> None:
        give_up = time.monotonic() + START_S
        while not ready():
            if node.poll() is not None and TOO_LATE in log.read_text():
                raise NotInTime(log.read_text())
            assert node.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)

    def _start_head(self, *arguments: str) -> None:
        port = self.dashboard.rpartition(":")[2]
        self._start(
            *("--head", "--node-ip-address=127.0.0.1", f"--port={self.port}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={port}", f"--temp-dir={self.folder}", *arguments),
        )
        self._wait(self._answers, self.nodes[0], self.folder / "node-0.log")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.dashboard}/api/gcs_healthz", timeout=30, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def end(self) -> None:
        """Kill every process: Ray takes half a minute to end by itself."""
        for node in self.nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            node.wait(timeout=60)


@contextmanager
def cluster_on_this_machine(
    *head: str, of_nodes: Mapping[str, str | None] | None = None, **environment: str | None
) -> Iterator[Cluster]:
    """A cluster of one node inside the block.

    Args:
        head: options of its `ray start`.
        of_nodes: variables that its nodes have otherwise than its clients; None: not at all.
        environment: variables of both.
    """
    dashboard, port = free_ports(2)
    variables: dict[str, str | None] = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        **environment,
    }
    # Of its own: a job finds the cluster that was started last there. A short path: sockets are in it.
    with tempfile.TemporaryDirectory(prefix="dgpo-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        clients, nodes = (
            {name: value for name, value in found.items() if value is not None}
            for found in (variables, variables | dict(of_nodes or {}))
        )
        made = Cluster(f"http://127.0.0.1:{dashboard}", port, Path(folder), clients, nodes)
        try:
            made._start_head(*head)
            yield made
        finally:
            made.end()
