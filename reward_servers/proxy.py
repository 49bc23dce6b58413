"""What Ray Serve's proxy answers by itself, in the form of the protocol.

Serve refuses in plain text: beyond `max_queued_requests`, while there is no replica, past
`request_timeout_s`, on a path that nobody serves; and where a replica dies it gives no answer at all. An
application sees none of that, so this wraps the proxy: Serve calls `error_bodies` where one starts, by

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=reward_servers.proxy.error_bodies

which launch.py sets for a Serve of its own, and deploy/serve/rewards.yaml asks for.

Promises
- An answer in plain text with a status of 400 or more gets an ErrorBody with its text; 429 and 503 have a
  Retry-After. Every other answer passes as it is, while it comes.
"""

from __future__ import annotations

from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_servers.protocol import JSON_TYPE, ProtocolError

CALLBACK: Final = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "reward_servers.proxy.error_bodies"}
"""Environment of a proxy that answers by the protocol."""

_MAX_DETAIL_BYTES: Final = 2000
_NO_ANSWER: Final = "it gave no answer: the replica died or failed; see its log"


def error_bodies() -> list[Middleware]:
    """Called by Serve's proxy."""
    return [Middleware(ErrorBodies)]


class ErrorBodies:
    """ASGI middleware around everything that a proxy serves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        await answer.end()


class _Answer:
    """One answer on its way: held back while it is an error in plain text."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._held: Message | None = None
        self._text = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            if _is_plain_error(message):
                self._held = message
                return
        if self._held is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            room = _MAX_DETAIL_BYTES - len(self._text)
            self._text += message.get("body", b"")[:room]
            if not message.get("more_body", False):
                await self._send_held()

    async def end(self) -> None:
        """The application has returned."""
        if not self._started:
            self._held = {"type": "http.response.start", "status": 500, "headers": []}
            self._text += _NO_ANSWER.encode()
        if self._held is not None:
            await self._send_held()

    async def _send_held(self) -> None:
        start, self._held = self._held, None
        assert start is not None
        detail = f"Ray Serve: {self._text.decode('utf-8', 'replace')}"
        body = ProtocolError(start["status"], detail).body.model_dump_json().encode()
        headers = MutableHeaders(raw=list(start.get("headers", [])))
        headers["content-type"] = JSON_TYPE
        headers["content-length"] = str(len(body))
        if start["status"] in (429, 503):
            headers.setdefault("retry-after", "1")
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})


def _is_plain_error(start: Message) -> bool:
    kind = MutableHeaders(raw=list(start.get("headers", []))).get("content-type", "")
    return int(start["status"]) >= 400 and (not kind or kind.startswith("text/plain"))
