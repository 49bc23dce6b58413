"""A server that answers as it is told, badly as a rule, and a client of it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from reward_servers.client import RewardClient
from reward_servers.exchange import MAX_ANSWER_BYTES

TOKEN = "a-token-for-tests-only"
GOOD = {"scores": [0.5] * 5, "details": [{}] * 5, "reward": "fake", "model": "m", "version": "7"}


@dataclass
class Reply:
    status: int = 200
    body: bytes = json.dumps(GOOD).encode()
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    endless: bool = False
    """The body comes again and again."""
    kind: str = "application/json"


@dataclass
class Script:
    """An ASGI application that gives its replies in turn; the last one again and again."""

    replies: list[Reply]
    requests: list[dict[str, Any]] = field(default_factory=list)
    sent: int = 0
    """Bytes of endless bodies."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        while (await receive()).get("more_body"):
            pass
        reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
        self.requests.append({"client": scope["client"], "headers": dict(scope["headers"])})
        if reply.hang:
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        headers = {"content-type": reply.kind} | reply.headers
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": raw})
        # What is sent to nobody is not counted: uvicorn then takes it at once.
        gone = asyncio.ensure_future(receive())
        while reply.endless and self.sent < 8 * MAX_ANSWER_BYTES and not gone.done():
            await send({"type": "http.response.body", "body": reply.body, "more_body": True})
            self.sent += len(reply.body)
            await asyncio.sleep(0)
        gone.cancel()
        await send({"type": "http.response.body", "body": reply.body})


def changed(**changes: Any) -> Reply:
    return Reply(body=json.dumps(GOOD | changes).encode())


def client_of(url: str, deadline_s: float = 20.0, **settings: Any) -> RewardClient:
    return RewardClient("words", url, TOKEN, deadline_s, **settings)
