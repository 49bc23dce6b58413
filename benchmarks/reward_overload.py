"""Requests at several times what a server can do: who is admitted is answered, the others are told so.

Every request is sent once, at its time, whether or not earlier ones were answered. Its id travels to the
scorer and back with the number of times the scorer has seen it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import numpy as np
import psutil
from pydantic import ValidationError

from benchmarks.reward_servers import DEADLINE_S, Load, Served, alone
from benchmarks.timed_scorer import TIMED
from reward_servers.protocol import SCORE_PATH, TENSOR_TYPE, ErrorBody
from reward_servers.wire import encode_tensors

IMAGE_S: Final = 0.02
MAX_PENDING: Final = 16
OVERLOAD: Final = 4
LEAST_OVERLOAD: Final = 3
"""What must have been offered: a machine that is busy with other work cannot send as fast as is asked."""
COMING_BACK: Final = 200
"""Requests that were shed and are sent again, through the client."""
_IMAGE: Final = np.zeros((1, 8, 8, 3), np.uint8)


@dataclass
class Answers:
    """What became of each request."""

    scored: list[int] = field(default_factory=list)
    shed: list[int] = field(default_factory=list)
    wrong: dict[int, str] = field(default_factory=dict)
    """Answered for another, scored twice, refused otherwise, or shed without saying when to come back."""
    lost: dict[int, str] = field(default_factory=dict)
    """Without an answer of HTTP: the connection broke, or nothing came in time."""
    seconds: list[float] = field(default_factory=list)
    """Of the scored ones."""
    sending_s: float = 0.0

    def take(self, number: int, response: httpx.Response, seconds: float) -> None:
        if response.status_code == 200:
            self.seconds.append(seconds)
            details = response.json()["details"][0]
            if (details["id"], details["times"]) == (str(number), 1):
                self.scored.append(number)
            else:
                self.wrong[number] = f"answered with {details}"
            return
        if response.status_code == 429 and _says_when(response):
            self.shed.append(number)
        else:
            self.wrong[number] = f"{response.status_code} {response.text[:80]}"

    @property
    def examples(self) -> list[str]:
        """Some of what is not as it should be."""
        return [*self.lost.values(), *self.wrong.values()][:3]


def _says_when(response: httpx.Response) -> bool:
    """Whether a request that was shed is told so by the protocol, and when to come back."""
    try:
        said = ErrorBody.model_validate_json(response.content).error
    except ValidationError:
        return False
    return said == "overloaded" and response.headers.get("retry-after", "").isdigit()


class ResidentMemory:
    """Bytes of a process, looked at ten times a second while the block lasts."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.samples: list[int] = []

    def __enter__(self) -> ResidentMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            self.samples.append(self._process.memory_info().rss)


def overload(requests: int) -> dict[str, Any]:
    """`requests` at OVERLOAD times the rate that the server reaches when it is merely busy."""
    arguments = {"image_s": IMAGE_S, "max_batch": 1}
    with alone(TIMED, arguments, max_pending=MAX_PENDING) as served:
        with Load(served, 8, _IMAGE, "p") as load:
            load.measure(1.0)
            capacity, _ = load.measure(3.0)
        total = _scored_by_server(served)
        with ResidentMemory(served.pid) as memory:
            answers = asyncio.run(_send(served, requests, OVERLOAD * capacity))
        # The probe before and the one after are scored too.
        uncounted = _scored_by_server(served) - total - 1 - len(answers.seconds)
        back = _come_back(served, answers.shed[:COMING_BACK])
    settled = memory.samples[len(memory.samples) // 10 :]
    offered = requests / answers.sending_s
    return {
        "requests": requests,
        "capacity_s": capacity,
        "offered_s": offered,
        "overload": offered / capacity,
        "scored": len(answers.scored),
        "shed": len(answers.shed),
        "lost": len(answers.lost),
        "wrong": len(answers.wrong),
        "examples": answers.examples,
        "scored_unanswered": uncounted,
        "scored_s": len(answers.scored) / answers.sending_s,
        "p50_s": float(np.percentile(answers.seconds, 50)),
        "p99_s": float(np.percentile(answers.seconds, 99)),
        "came_back": min(COMING_BACK, len(answers.shed)),
        "came_back_scored_once": back,
        "memory_start_bytes": settled[0],
        "memory_most_bytes": max(settled),
        "memory_growth": max(settled) / settled[0] - 1,
        "met": not answers.lost
        and offered >= LEAST_OVERLOAD * capacity
        and not answers.wrong
        and uncounted == 0
        and back == min(COMING_BACK, len(answers.shed)),
    }


async def _send(served: Served, requests: int, rate: float) -> Answers:
    answers = Answers()
    headers = {"Authorization": f"Bearer {served.token}", "Content-Type": TENSOR_TYPE}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=MAX_PENDING)
    async with httpx.AsyncClient(
        base_url=served.url, headers=headers, limits=limits, timeout=DEADLINE_S, trust_env=False
    ) as client:

        async def send(number: int) -> None:
            asked = time.perf_counter()
            body = encode_tensors(_IMAGE, "p", {"id": str(number)})
            try:
                response = await client.post(SCORE_PATH, content=body)
            except httpx.HTTPError as error:
                answers.lost[number] = f"{type(error).__name__}: {error}"
                return
            answers.take(number, response, time.perf_counter() - asked)

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                group.create_task(send(number))
                await asyncio.sleep(max(0.0, started + (number + 1) / rate - time.perf_counter()))
            answers.sending_s = time.perf_counter() - started
    return answers


def _scored_by_server(served: Served) -> int:
    """Images that the server has scored since it started, this question included."""
    client = served.client()
    try:
        return int(client.score(_IMAGE, "p").details[0]["total"])
    finally:
        client.close()


def _come_back(served: Served, numbers: list[int]) -> int:
    """How many of the requests that were shed are scored, once, when the client sends them."""
    client = served.client()

    def once(number: int) -> bool:
        details = client.score(_IMAGE, "p", {"id": str(number)}).details[0]
        return bool(details["id"] == str(number) and details["times"] == 1)

    try:
        with ThreadPoolExecutor(2 * MAX_PENDING) as pool:
            return sum(pool.map(once, numbers))
    finally:
        client.close()
