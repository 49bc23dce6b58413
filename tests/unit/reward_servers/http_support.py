"""Requests to a reward server, and what a refusal is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx

from reward_servers.protocol import JSON_TYPE, TENSOR_TYPE, ErrorBody


def post(url: str, body: bytes, token: str | None, kind: str = TENSOR_TYPE) -> httpx.Response:
    headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
    return httpx.post(f"{url}/v1/score", content=body, headers=headers, trust_env=False, timeout=20)


def admitted(url: str, body: bytes, token: str) -> httpx.Response:
    """Asked again for as long as there is no place: `no_place_left` may have taken it for a moment."""
    while (response := post(url, body, token)).status_code == 429:
        continue
    return response


def refused(response: httpx.Response, status: int, says: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == JSON_TYPE
    assert says in ErrorBody.model_validate_json(response.content).detail


def no_place_left(url: str, token: str) -> bool:
    """Asked with a body that is refused if there is a place to read it in."""
    return post(url, b"none", token).status_code == 429


def until(condition: Callable[[], bool]) -> None:
    pause, end = threading.Event(), time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.005)
