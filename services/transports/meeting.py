"""Where publisher and receivers of weights meet: requests, answers, and the few bytes by which a process
group finds its members. Part of the PolicyStore actor, whose methods are as guarded as all calls of Ray.

Promises
- Every wait has a deadline.
- A publisher that has ended, or is not heard of any more, is told at once to who asks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final, Literal
from uuid import uuid4

from pydantic import Field

from services.messages import Message, PolicyVersion

Answer = Literal["nccl", "gloo", "gone"]
"""How the weights that were asked for come, or that their publisher has newer ones only."""

SILENCE_S: Final = 10.0
"""A publisher that has listened to nobody for so long is taken for dead."""
POLL_S: Final = 0.5


class Want(Message):
    """A request for weights."""

    number: str = Field(default_factory=lambda: uuid4().hex)
    """Of the request."""
    pair: str
    """Names publisher and receiver, for as long as both live."""
    kind: str
    version: PolicyVersion
    gpu: bool
    """Whether the receiver has one."""


class MeetingPlace:
    """See the module. All of it runs in one event loop."""

    def __init__(self) -> None:
        self._asked: deque[Want] = deque()
        self._more = asyncio.Event()
        self._answers: dict[str, asyncio.Future[Answer]] = {}
        self._values: dict[str, bytes] = {}
        self._new_value = asyncio.Condition()
        self._publishes = False
        self._heard = 0.0

    async def publisher_begins(self) -> None:
        """Requests to a former one are not answered any more."""
        await self.publisher_ends()
        self._publishes, self._heard = True, time.monotonic()

    async def publisher_ends(self) -> None:
        self._publishes = False
        self._asked.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result("gone")

    async def next_want(self, seconds: float) -> str | None:
        """The next request (Want as JSON); None if there is none in so many seconds."""
        give_up = time.monotonic() + seconds
        while not self._asked:
            self._heard = time.monotonic()
            self._more.clear()
            try:
                await asyncio.wait_for(self._more.wait(), min(POLL_S, max(0.0, give_up - self._heard)))
            except TimeoutError:
                if time.monotonic() >= give_up:
                    return None
        self._heard = time.monotonic()
        return self._asked.popleft().model_dump_json()

    async def answer(self, number: str, answer: Answer) -> None:
        """Of the publisher, to a request."""
        waiting = self._answers.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def want(self, want: str, seconds: float) -> Answer | None:
        """The publisher's answer to a request (Want as JSON); None if nobody publishes.

        Raises:
            TimeoutError: it has not answered in so many seconds.
        """
        asked = Want.model_validate_json(want)
        waiting = self._answers[asked.number] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        self._more.set()
        give_up = time.monotonic() + seconds
        try:
            while self._publishes and time.monotonic() - self._heard < SILENCE_S:
                try:
                    return await asyncio.wait_for(asyncio.shield(waiting), POLL_S)
                except TimeoutError:
                    if time.monotonic() >= give_up:
                        raise TimeoutError(f"the publisher has not answered for {seconds:g} s") from None
            return None
        finally:
            del self._answers[asked.number]
            if asked in self._asked:
                self._asked.remove(asked)

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
            return self._values[key]

    async def forget(self, pair: str) -> None:
        """The values of a pair that is no more."""
        for key in [key for key in self._values if key.startswith(f"{pair}/")]:
            del self._values[key]
