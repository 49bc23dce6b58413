"""Where the publisher of weights and its receivers find each other: requests, answers, and the few bytes by
which a process group finds its members. Part of the PolicyStore actor, whose methods are as guarded as all of
Ray's.

Promises
- Every wait has a deadline.
- A publisher that has ended, or is not heard of any more, is told at once to who asks.
- A publisher that another has replaced hears of no request any more.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final, Literal
from uuid import uuid4

from pydantic import Field

from services.messages import Message, PolicyVersion

Answer = Literal["come", "reconnect"]
"""The publisher is there, by this connection; or it knows no such connection, and a new one must be made."""

SILENCE_S: Final = 10.0
"""A publisher that has listened to nobody for so long is taken for dead."""
POLL_S: Final = 0.5


class WeightsRequest(Message):
    """A receiver asks for weights."""

    id: str = Field(default_factory=lambda: uuid4().hex)
    receiver: str
    """The same for the life of its process."""
    connection: str
    connected: bool
    """Whether it takes the connection for made."""
    kind: str
    version: PolicyVersion


class Rendezvous:
    """See the module. All of it runs in one event loop."""

    def __init__(self) -> None:
        self._requests: deque[WeightsRequest] = deque()
        self._more = asyncio.Event()
        self._answers: dict[str, asyncio.Future[Answer | None]] = {}
        self._values: dict[str, bytes] = {}
        self._new_value = asyncio.Condition()
        self._publisher: str | None = None
        self._heard = 0.0

    async def publisher_begins(self, publisher: str) -> None:
        """Requests to a former one are not answered any more."""
        self._end()
        self._publisher, self._heard = publisher, time.monotonic()

    async def publisher_there(self, publisher: str) -> bool:
        """Whether requests still go to this one."""
        return publisher == self._publisher

    async def publisher_ends(self, publisher: str) -> None:
        if publisher == self._publisher:
            self._end()

    def _end(self) -> None:
        self._publisher = None
        self._requests.clear()
        self._more.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)

    async def next_request(self, publisher: str, seconds: float) -> str | None:
        """The next WeightsRequest, as JSON; None if there is none in so many seconds."""
        give_up = time.monotonic() + seconds
        while publisher == self._publisher:
            self._heard = time.monotonic()
            if self._requests:
                return self._requests.popleft().model_dump_json()
            if self._heard >= give_up:
                return None
            self._more.clear()
            try:
                await asyncio.wait_for(self._more.wait(), min(POLL_S, give_up - self._heard))
            except TimeoutError:
                continue
        return None

    async def answer(self, request: str, answer: Answer) -> None:
        """Of the publisher, to a request (its id)."""
        waiting = self._answers.get(request)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def request(self, request: str, seconds: float) -> Answer | None:
        """The publisher's answer to a WeightsRequest, given as JSON; None if nobody publishes.

        Raises:
            TimeoutError: it has not answered in so many seconds.
        """
        asked = WeightsRequest.model_validate_json(request)
        waiting: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._answers[asked.id] = waiting
        self._requests.append(asked)
        self._more.set()
        give_up = time.monotonic() + seconds
        try:
            while self._publisher is not None and time.monotonic() - self._heard < SILENCE_S:
                try:
                    return await asyncio.wait_for(asyncio.shield(waiting), POLL_S)
                except TimeoutError:
                    if time.monotonic() >= give_up:
                        raise TimeoutError(f"the publisher has not answered for {seconds:g} s") from None
            return None
        finally:
            del self._answers[asked.id]
            if asked in self._requests:
                self._requests.remove(asked)

    async def set_value(self, key: str, value: bytes) -> None:
        """One of the bytes by which a process group finds its members."""
        async with self._new_value:
            self._values[key] = value
            self._new_value.notify_all()

    async def value(self, key: str, seconds: float) -> bytes | None:
        """The same, once it is there; None if it does not come in so many seconds."""
        async with self._new_value:
            try:
                await asyncio.wait_for(self._new_value.wait_for(lambda: key in self._values), seconds)
            except TimeoutError:
                return None
            return self._values.get(key)

    async def forget(self, connection: str) -> None:
        """The values of a connection that is made, or is no more."""
        for key in [key for key in self._values if key.startswith(f"{connection}/")]:
            del self._values[key]
