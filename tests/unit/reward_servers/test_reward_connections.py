"""Connections that break off, come slowly or never end: their places are given back, and the server lives."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from reward_servers.client import RewardClient
from reward_servers.protocol import TENSOR_TYPE
from reward_servers.wire import encode_tensors
from tests.unit.reward_servers.http_support import no_place_left, post, refused, until

Serve = Callable[..., str]
Images = NDArray[np.uint8]


def test_a_body_without_a_length_is_cut_off(serve_fake: Serve, token: str) -> None:
    """Sent in chunks, it is refused before it ends: the client here never ends it."""
    host, port = serve_fake(limits={"max_body_bytes": 1500}).removeprefix("http://").split(":")
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}Content-Type: {TENSOR_TYPE}\r\n".encode())
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"800\r\n" + bytes(0x800) + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def beginning_a_body(url: str, token: str) -> socket.socket:
    """A request whose body is being waited for."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 1000\r\n"
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(f"{head}Content-Type: {TENSOR_TYPE}\r\nExpect: 100-continue\r\n\r\n".encode())
    assert connection.recv(4096).startswith(b"HTTP/1.1 100"), "said when the body is asked for"
    return connection


def scores_in_the_end(url: str, token: str, images: Images) -> bool:
    """Asks until there is a place, for 20 s."""
    client = RewardClient("words", url, token, 20)
    try:
        return len(client.score(images[:1], "p").scores) == 1
    finally:
        client.close()


def test_a_body_that_is_being_read_has_a_place_until_it_breaks_off(
    serve_fake: Serve, token: str, images: Images
) -> None:
    url = serve_fake(max_pending=1)
    with beginning_a_body(url, token):
        refused(post(url, encode_tensors(images[:1], "p"), token), 429, "at most 1")
    assert scores_in_the_end(url, token, images), "the server has seen it leave"


def test_a_body_that_does_not_come_loses_its_place(serve_fake: Serve, token: str, images: Images) -> None:
    url = serve_fake(max_pending=1, deadline_s=0.5)
    with beginning_a_body(url, token) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert scores_in_the_end(url, token, images)


def test_a_client_that_goes_while_it_waits_gives_its_place_up_and_is_not_scored(
    serve_fake: Serve, token: str, images: Images, fake: Any
) -> None:
    """Two places, one in the scorer: the other is taken by who goes, and then by who stays."""
    url = serve_fake(max_pending=2)
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(post, url, encode_tensors(images[:1], "hang"), token)
        assert fake.entered.wait(20)
        with sent(url, token, encode_tensors(images[:1], "left")):
            until(lambda: no_place_left(url, token))
        until(lambda: not no_place_left(url, token))
        late = pool.submit(post, url, encode_tensors(images[:1], "stays"), token)
        until(lambda: no_place_left(url, token))
        fake.released.set()
        assert busy.result(20).status_code == late.result(20).status_code == 200
    assert fake.calls == [["hang"], ["stays"]]


def test_a_client_that_goes_while_it_is_scored_gives_its_place_up(
    serve_fake: Serve, token: str, images: Images, fake: Any
) -> None:
    url = serve_fake(max_pending=1)
    with sent(url, token, encode_tensors(images[:1], "hang")):
        assert fake.entered.wait(20)
        assert no_place_left(url, token)
    until(lambda: not no_place_left(url, token))
    fake.released.set()
    assert post(url, encode_tensors(images[:1], "p"), token).status_code == 200


def sent(url: str, token: str, body: bytes) -> socket.socket:
    """A whole request, whose answer nobody reads."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(f"{head}Content-Type: {TENSOR_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    connection.sendall(body)
    return connection


def refused_raw(url: str, request: bytes, status: int) -> str:
    """What comes for a request as it is, until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        with suppress(ConnectionError):  # the server no longer reads
            connection.sendall(request)
        answer = b""
        with suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    return answer.decode("latin-1")


def test_headers_without_end_are_cut_off(serve_fake: Serve, token: str, images: Images) -> None:
    url = serve_fake()
    refused_raw(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 2_000_000, 400)
    refused_raw(
        url, b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400
    )
    assert post(url, encode_tensors(images[:1], "p"), token).status_code == 200


def test_an_upgrade_is_refused_as_what_it_asks_for(serve_fake: Serve) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    answer = refused_raw(
        serve_fake(),
        b"GET /v1/score HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        + upgrade
        + b"\r\n"
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        405,
    )
    assert "method_not_allowed" in answer


def test_nobody_is_led_elsewhere(serve_fake: Serve, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}", "Host": "elsewhere.example"}
    response = httpx.post(serve_fake() + "/v1/score/", headers=headers, trust_env=False)
    refused(response, 404, "/v1/score/")
    assert "location" not in response.headers


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nX-Slow: "])
def test_a_connection_without_a_request_is_closed(
    serve_fake: Serve, token: str, images: Images, fake: Any, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    """One that waits for its answer is not."""
    monkeypatch.setattr("reward_servers.local.HEADERS_S", 0.1)
    host, port = (url := serve_fake()).removeprefix("http://").split(":")
    with ThreadPoolExecutor(1) as pool, socket.create_connection((host, int(port)), timeout=20) as silent:
        waiting = pool.submit(post, url, encode_tensors(images[:1], "hang"), token)
        assert fake.entered.wait(20)
        silent.sendall(begun)
        assert silent.recv(1) == b""
        threading.Event().wait(0.3)
        fake.released.set()
        assert waiting.result(20).status_code == 200
