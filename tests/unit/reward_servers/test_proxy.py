"""Plain-text errors of Serve's proxy become error bodies, and nothing else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_servers.protocol import JSON_TYPE, ErrorBody
from reward_servers.proxy import CALLBACK, ErrorBodies, error_bodies


def answering(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


def plain(status: int, *parts: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> ASGIApp:
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"text/plain; charset=utf-8"), *headers],
    }
    bodies: list[Message] = [
        {"type": "http.response.body", "body": part, "more_body": place < len(parts) - 1}
        for place, part in enumerate(parts)
    ]
    return answering(start, *bodies)


def get(app: ASGIApp) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=ErrorBodies(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.get("/")

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("app", "status", "error", "retry_after", "says"),
    [
        (plain(429, b"drop", b"ped"), 429, "overloaded", "1", "Ray Serve: dropped"),
        (plain(429, b"", headers=[(b"retry-after", b"7")]), 429, "overloaded", "7", "Ray Serve"),
        (plain(503, b"no replica"), 503, "unavailable", "1", "no replica"),
        (plain(408, b"timed out"), 408, "body_too_late", None, "timed out"),
        (plain(404, b"no such path"), 404, "not_found", None, "no such path"),
        (plain(500, b"x" * 100_000), 500, "scorer_failed", None, "xxx"),
        (answering(), 500, "scorer_failed", None, "no answer"),
    ],
)
def test_plain_errors(app: ASGIApp, status: int, error: str, retry_after: str | None, says: str) -> None:
    answer = get(app)
    body = ErrorBody.model_validate_json(answer.content)
    assert (answer.status_code, body.error) == (status, error)
    assert says in body.detail and len(body.detail) < 3000
    assert answer.headers["content-type"] == JSON_TYPE
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers.get("retry-after") == retry_after


def test_what_is_no_plain_error_passes_as_it_is() -> None:
    assert get(plain(200, b"suc", b"cess")).text == "success"
    own = b'{"error": "overloaded", "detail": "of the application"}'
    start = {"type": "http.response.start", "status": 429, "headers": [(b"content-type", JSON_TYPE.encode())]}
    answer = get(answering(start, {"type": "http.response.body", "body": own}))
    assert (answer.status_code, answer.content) == (429, own)
    assert "retry-after" not in answer.headers


def test_parts_pass_while_they_come() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Message) -> None:
        sent.append(dict(message))

    async def receive() -> Message:
        return {"type": "http.request"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert [message["type"] for message in sent] == ["http.response.start"]
        await send({"type": "http.response.body", "body": b"end"})

    asyncio.run(ErrorBodies(app)({"type": "http"}, receive, send))
    assert sent[-1]["body"] == b"end"


def test_an_error_of_the_proxy_itself_is_raised() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        get(broken)


def test_serve_finds_it_by_its_path() -> None:
    """Under the name that this Serve reads, as what it calls there must be."""
    from ray._common.utils import import_attr
    from ray.serve._private import constants
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    ((name, path),) = CALLBACK.items()
    assert hasattr(constants, name)
    assert import_attr(path) is error_bodies
    assert validate_http_proxy_callback_return(error_bodies())
