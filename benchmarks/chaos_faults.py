"""What `dgpo bench chaos` does to a run: one function a fault, each aimed at one part."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import redis

from benchmarks.chaos_machine import Clock, fill
from reward_servers.protocol import SCORE_PATH
from services.embedded import EmbeddedServerError, EmbeddedValkey
from services.group_queue import GroupQueue, QueueUnreachable, connect
from services.messages import Heartbeat
from services.run_directory import RunDirectory

AIM_S: Final = 5.0
"""A part that is to be hit while it does something is hit anyway after this long."""
ABSENT_S: Final = 120.0
"""A part that is being made anew is waited for."""
POLL_S: Final = 0.01
SILENCE_S: Final = 5.0
"""Longer than an attempt of a client."""
REFUSED_S: Final = 60.0
FULL_S: Final = 240.0
"""A run whose disk is full has ended after this long."""
JUMP_S: Final = 3600


class FaultError(RuntimeError):
    """The fault could not be injected, or what should have been refused was not."""


class Flaky:
    """An ASGI reward server that can be told to misbehave for a while."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.mode = "well"
        self.met = 0
        """Requests that were answered otherwise than well."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != SCORE_PATH or self.mode == "well":
            await self._app(scope, receive, send)
            return
        self.met += 1
        if self.mode == "slow":
            await asyncio.sleep(1.0)
            await self._app(scope, receive, send)
            return
        if self.mode == "silent":
            await asyncio.sleep(SILENCE_S)
            return  # the connection ends without an answer
        status, body = (500, b"down") if self.mode == "errors" else (200, b'{"scores": [NaN]}')
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Site:
    """A run under fire."""

    directory: RunDirectory
    flaky: Flaky
    start: Callable[[], subprocess.Popen[str]]
    """Start, or resume, the driver."""
    driver: subprocess.Popen[str]
    clock: Clock | None = None
    """Of the queue server."""
    _queue: GroupQueue | None = None

    def beats(self) -> dict[str, Heartbeat]:
        """Of the parts that live; none while the queue is down."""
        try:
            if self._queue is None:
                url, password = EmbeddedValkey.join(self.directory.queue)
                queue = self.directory.config().queue
                self._queue = GroupQueue(connect(url, password), self.directory.name, queue)
            return {part: beat for part, beat in self._queue.heartbeats().items() if beat is not None}
        except (QueueUnreachable, EmbeddedServerError, OSError, redis.RedisError):
            self._queue = None
            return {}

    def aim(self, part: str, state: str, rng: random.Random) -> tuple[int, bool]:
        """The process of a part of this kind, if it can be while it is doing this; and whether it is."""
        give_up, found = time.monotonic() + AIM_S, list[Heartbeat]()
        while True:
            beats = [beat for name, beat in self.beats().items() if name.startswith(part)]
            aimed = [beat for beat in beats if beat.state.startswith(state)]
            found = beats or found
            if aimed or (found and time.monotonic() > give_up):
                return rng.choice(aimed or found).pid, bool(aimed)
            if time.monotonic() > give_up + ABSENT_S:
                raise FaultError(f"there is no {part} to hit")
            time.sleep(POLL_S)

    def processes(self, title: str) -> list[psutil.Process]:
        """Children of the driver, of any generation, whose title begins so."""
        found = []
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def queue_server(self) -> psutil.Process:
        port = urlsplit((self.directory.queue / "url").read_text().strip()).port
        for child in psutil.Process(self.driver.pid).children():
            if port in {place.laddr.port for place in child.net_connections() if place.status == "LISTEN"}:
                return child
        raise FaultError("there is no queue server to hit")


Fault = Callable[[Site, random.Random], bool]
"""Injects it; returns whether it met what it was aimed at: a part in that state, a request."""


def _kill(part: str, state: str = "") -> Fault:
    def inject(site: Site, rng: random.Random) -> bool:
        pid, aimed = site.aim(part, state, rng)
        os.kill(pid, signal.SIGKILL)
        return aimed

    return inject


def _pause_worker(site: Site, rng: random.Random) -> bool:
    """Past its lease, which another worker then gets."""
    pid, aimed = site.aim("rollout-", "sampling", rng)
    process = psutil.Process(pid)
    process.suspend()
    try:
        time.sleep(site.directory.config().queue.lease_s * 1.5)
    finally:
        if process.is_running():
            process.resume()
    return aimed


def _stop_worker(site: Site, rng: random.Random) -> bool:
    """For good: its process neither works nor dies."""
    pid, aimed = site.aim("rollout-", "sampling", rng)
    stopped = psutil.Process(pid)
    stopped.suspend()
    try:
        stopped.wait(site.directory.config().rollout.hang_s + REFUSED_S)
    except psutil.TimeoutExpired:
        stopped.kill()
        raise FaultError(f"a worker that is stopped was not killed: {pid}") from None
    return aimed


def _kill_queue(site: Site, rng: random.Random) -> bool:
    site.queue_server().kill()
    return True


def _wipe_queue(site: Site, rng: random.Random) -> bool:
    server = site.queue_server()
    server.suspend()
    try:
        shutil.rmtree(site.directory.queue / "appendonlydir")
    finally:
        server.kill()
    return True


def _kill_driver(site: Site, rng: random.Random) -> bool:
    site.driver.kill()
    site.driver.wait(REFUSED_S)
    site.driver = site.start()
    return True


def _fill_disk(site: Site, rng: random.Random) -> bool:
    """Of the run directory; once the run has ended there is room again, and it is resumed."""
    filler = fill(site.directory.root.parent)
    try:
        site.driver.wait(FULL_S)
    except subprocess.TimeoutExpired:
        raise FaultError(f"the run goes on without room on its disk for {FULL_S:g} s") from None
    finally:
        filler.unlink()
    if site.driver.returncode == 0:
        return False  # it was at its end
    site.driver = site.start()
    return True


def _jump(seconds: int) -> Fault:
    def inject(site: Site, rng: random.Random) -> bool:
        assert site.clock is not None
        site.clock.jump(seconds)
        return True

    return inject


def resumed(directory: RunDirectory, **streams: Any) -> subprocess.Popen[str]:
    """A driver of the run, as from the command line."""
    command = [sys.executable, "-m", "services.cli", "train", "--resume", str(directory.root), "--json"]
    return subprocess.Popen(command, text=True, **streams)


def _second_driver(site: Site, rng: random.Random) -> bool:
    second = resumed(site.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        _, told = second.communicate(timeout=REFUSED_S)
    finally:
        second.kill()
    if site.driver.poll() is not None or "nothing to do" in told:
        return False  # the run had ended by then, or all its updates were done
    if second.returncode != 2 or "another driver" not in told:
        raise FaultError(f"a second driver was not refused: {second.returncode}: {told[-400:]}")
    return True


def _reward(mode: str) -> Fault:
    def inject(site: Site, rng: random.Random) -> bool:
        site.flaky.mode, before = mode, site.flaky.met
        try:
            time.sleep(rng.uniform(1.0, 3.0))
        finally:
            site.flaky.mode = "well"
        return site.flaky.met > before

    return inject


def _kill_serve(title: str) -> Fault:
    def inject(site: Site, rng: random.Random) -> bool:
        found = site.processes(title)
        if not found:
            raise FaultError(f"there is no process {title}... to hit")
        rng.choice(found).kill()
        return True

    return inject


FAULTS: Final[dict[str, Fault]] = {
    "worker-killed": _kill("rollout-"),
    "worker-killed-sampling": _kill("rollout-", "sampling"),
    "worker-killed-scoring": _kill("rollout-", "waiting for scores"),
    "worker-paused": _pause_worker,
    "worker-stopped": _stop_worker,
    "learner-killed-updating": _kill("learner-0", "updating"),
    "learner-killed-publishing": _kill("learner-0", "publishing step"),
    "learner-killed-checkpointing": _kill("learner-0", "checkpointing"),
    "learner-killed-waiting": _kill("learner-0", "waiting"),
    "rank-killed": _kill("learner-1"),
    "queue-killed": _kill_queue,
    "queue-wiped": _wipe_queue,
    "reward-slow": _reward("slow"),
    "reward-errors": _reward("errors"),
    "reward-wrong": _reward("wrong"),
    "reward-silent": _reward("silent"),
    "replica-killed": _kill_serve("ray::ServeReplica"),
    "proxy-killed": _kill_serve("ray::ProxyActor"),
    "evaluator-killed": _kill("evaluator"),
    "clock-ahead": _jump(JUMP_S),
    "clock-back": _jump(-JUMP_S),
    "disk-full": _fill_disk,
    "driver-killed": _kill_driver,
    "second-driver": _second_driver,
}
SERVE: Final = frozenset({"replica-killed", "proxy-killed"})
"""Need rewards on Ray Serve."""
CLOCK: Final = frozenset({"clock-ahead", "clock-back"})
DISK: Final = frozenset({"disk-full"})
RANKS: Final = frozenset({"rank-killed"})
"""Need `learner.ranks=2`."""
