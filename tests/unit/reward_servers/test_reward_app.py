"""The HTTP application over a real socket: token, limits, errors, and life after each of them."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from reward_servers.app import create_app
from reward_servers.client import RewardClient
from reward_servers.local import LocalServer
from reward_servers.protocol import JSON_TYPE, TENSOR_TYPE, ErrorBody, ScoreResponse, ServerInfo
from reward_servers.server_config import ServerConfig
from reward_servers.wire import encode_json, encode_png, encode_tensors

Serve = Callable[..., str]
Images = NDArray[np.uint8]


def post(url: str, body: bytes, token: str | None, kind: str = TENSOR_TYPE) -> httpx.Response:
    headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
    return httpx.post(f"{url}/v1/score", content=body, headers=headers, trust_env=False, timeout=20)


def refused(response: httpx.Response, status: int, says: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == JSON_TYPE
    assert says in ErrorBody.model_validate_json(response.content).detail


def test_both_bodies_get_the_same_scores(serve_fake: Serve, token: str, images: Images) -> None:
    url = serve_fake()
    binary = post(url, encode_tensors(images, "p"), token)
    text = post(url, encode_json(list(images), "p"), token, "application/json; charset=utf-8")
    answer = ScoreResponse.model_validate_json(binary.content)
    assert answer.scores == tuple(image.mean() for image in images)
    assert (answer.reward, answer.version, answer.details[0]) == ("fake", "7", {"prompt": "p"})
    assert text.json() == binary.json()


def test_info_says_what_it_is(serve_fake: Serve, token: str) -> None:
    url = serve_fake(batching="dynamic", limits={"max_images": 3})
    response = httpx.get(f"{url}/v1/info", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    info = ServerInfo.model_validate_json(response.content)
    assert (info.reward, info.batching, info.max_batch, info.limits.max_images) == ("fake", "dynamic", 4, 3)


@pytest.mark.parametrize(
    "header",
    [None, "Bearer wrong-token-wrong-token", "Basic {}", "{}", "Bearer", "Bearer {}x", "Bearer \xff"],
)
def test_the_token_is_asked_for(serve_fake: Serve, token: str, header: str | None) -> None:
    url = serve_fake()
    headers = {"Content-Type": TENSOR_TYPE}
    if header is not None:
        headers["Authorization"] = header.format(token)
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("POST", "/v1/score"), ("GET", "/v1/info")):
        response = httpx.request(method, url + path, headers=encoded, trust_env=False)
        refused(response, 401, "Authorization: Bearer")
        assert response.headers["www-authenticate"] == "Bearer"
        assert token not in response.text


def test_health_needs_no_token(serve_fake: Serve) -> None:
    assert httpx.get(serve_fake() + "/healthz", trust_env=False).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "kind", "status", "says"),
    [
        (b"{}", "text/plain", 415, "text/plain"),
        (b"{}", "", 415, "content type ''"),
        (b"\x80\x04pickle", "application/octet-stream", 415, "octet-stream"),
        (b"{", JSON_TYPE, 422, "JSON"),
        (b"garbage", TENSOR_TYPE, 422, "safetensors"),
        (bytes(2000), TENSOR_TYPE, 413, "1500 bytes"),
        (encode_tensors(np.zeros((1, 2, 2, 3), np.uint8), "unscorable"), TENSOR_TYPE, 422, "item 0: cannot"),
        (encode_tensors(np.zeros((4, 2, 2, 3), np.uint8), "p"), TENSOR_TYPE, 413, "at most 3"),
        (encode_tensors(np.zeros((1, 2, 2, 3), np.uint8), "raise"), TENSOR_TYPE, 500, "asked to raise"),
    ],
)
def test_bad_requests_leave_it_alive(
    serve_fake: Serve, token: str, images: Images, body: bytes, kind: str, status: int, says: str
) -> None:
    # One place: a refused request that kept it would leave none.
    url = serve_fake(limits={"max_images": 3, "max_body_bytes": 1500}, max_pending=1)
    refused(post(url, body, token, kind), status, says)
    assert post(url, encode_tensors(images[:2], "p"), token).status_code == 200


def tensor(dtype: str, array: NDArray[Any]) -> bytes:
    """A safetensors file of any dtype, with a prompt."""
    entry = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [0, array.nbytes]}
    header = json.dumps({"__metadata__": {"prompts": '"p"'}, "images": entry}).encode()
    return struct.pack("<Q", len(header)) + header + array.tobytes()


def bomb() -> str:
    """A PNG of a few bytes that says it is 30000 x 30000, base64."""
    size = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (size, b"IEND")]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


ONE = base64.b64encode(encode_png(np.zeros((2, 2, 3), np.uint8))).decode()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"images": [base64.b64encode(b"GIF89a").decode()], "prompts": "p"}, 422, "images[0]: not a PNG"),
        ({"images": ["no base64"], "prompts": "p"}, 422, "images[0]: not base64"),
        ({"images": [bomb()], "prompts": "p"}, 413, "900000000 pixels"),
        ({"images": [], "prompts": "p"}, 422, "none given"),
        ({"images": [ONE], "prompts": ["p", "q"]}, 422, "2 for 1 images"),
        ({"images": [ONE], "prompts": "p", "metadata": [{}, {}]}, 422, "2 for 1 images"),
        ({"images": [ONE], "prompts": "p", "guidance": 4.5}, 422, "guidance"),
        (tensor("U8", np.zeros((0, 2, 2, 3), np.uint8)), 422, "none given"),
        (tensor("U8", np.zeros((1, 2, 2, 4), np.uint8)), 422, "3 channels"),
        (
            tensor("F32", np.full((1, 2, 2, 3), np.nan, np.float32)),
            422,
            "dtype must be U8 (0..255), found 'F32'",
        ),
        (tensor("F32", np.zeros((1, 2, 2, 3), np.float32)), 422, "dtype must be U8"),
        (tensor("U8", np.zeros((1, 2, 2, 3), np.uint8))[:-1], 422, "11 bytes of data"),
    ],
)
def test_what_is_no_image_is_named(
    serve_fake: Serve, token: str, images: Images, body: dict[str, Any] | bytes, status: int, says: str
) -> None:
    url = serve_fake(max_pending=1)
    binary = isinstance(body, bytes)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    refused(post(url, sent, token, TENSOR_TYPE if binary else JSON_TYPE), status, says)
    assert post(url, encode_tensors(images[:2], "p"), token).status_code == 200


def test_a_prompt_that_ocr_cannot_look_for_is_refused(
    token_file: Path, token: str, words: tuple[list[str], Images]
) -> None:
    chosen, renders = words
    with LocalServer(create_app(ServerConfig(app="ocr", token_file=token_file))) as server:
        refused(post(server.url, encode_tensors(renders[:2], "a cat"), token), 422, "double quotes")
        quoted = [f'a sign "{word}"' for word in chosen[:2]]
        mixed = encode_tensors(renders[:3], [*quoted, "a cat"])
        refused(post(server.url, mixed, token), 422, "item 2: ")
        assert post(server.url, encode_tensors(renders[:2], quoted), token).json()["scores"] == [1.0, 1.0]


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


def no_place_left(url: str, token: str) -> bool:
    """Asked with a body that is refused if there is a place to read it in."""
    return post(url, b"none", token).status_code == 429


def until(condition: Callable[[], bool]) -> None:
    pause, end = threading.Event(), time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.005)


@pytest.mark.parametrize("batching", ["request", "dynamic"])
@pytest.mark.parametrize("invariant", [True, False])
def test_waiting_requests_are_merged_where_it_cannot_be_seen_or_is_asked_for(
    serve_fake: Serve,
    token: str,
    images: Images,
    fake: Any,
    batching: str,
    invariant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(fake), "batch_invariant", invariant)
    url = serve_fake(batching=batching, max_pending=4)
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(post, url, encode_tensors(images[:1], "hang"), token)
        assert fake.entered.wait(20)
        waiting = [pool.submit(post, url, encode_tensors(images[:1], "p"), token) for _ in range(3)]
        until(lambda: no_place_left(url, token))
        fake.released.set()
        assert {task.result(20).status_code for task in (busy, *waiting)} == {200}
    merged = invariant or batching == "dynamic"
    # At most max_batch images at once, which is 4.
    assert fake.calls == [["hang"], *([["p"] * 3] if merged else [["p"]] * 3)]


def test_a_failed_item_is_null_and_named(serve_fake: Serve, token: str, images: Images) -> None:
    response = post(serve_fake(), encode_tensors(images[:3], ["a", "nan", "error"]), token)
    answer = ScoreResponse.model_validate_json(response.content)
    assert response.status_code == 200
    assert [score is None for score in answer.scores] == [False, True, True]
    assert {error.index: error.error for error in answer.errors}[2] == "asked for an error"
    assert "NaN" not in response.text


def test_a_hanging_scorer_is_a_504_and_then_unhealthy(
    serve_fake: Serve, token: str, images: Images, fake: Any
) -> None:
    url = serve_fake(deadline_s=0.5)
    refused(post(url, encode_tensors(images[:1], "hang"), token), 504, "0.5 s")
    health = httpx.get(url + "/healthz", trust_env=False)
    refused(health, 503, "has not answered")
    assert int(health.headers["retry-after"]) >= 1
    fake.released.set()


def test_unknown_paths_and_methods_say_what_there_is(serve_fake: Serve) -> None:
    url = serve_fake()
    refused(httpx.get(url + "/v2/score", trust_env=False), 404, "/v1/score")
    refused(httpx.get(url + "/v1/score", trust_env=False), 405, "GET /v1/score")


def test_a_scorer_of_another_package_is_served_by_its_import_path(token_file: Path, token: str) -> None:
    config = ServerConfig(app="benchmarks.timed_scorer:create", args={"image_s": 0.0}, token_file=token_file)
    with LocalServer(create_app(config)) as server:
        answer = post(server.url, encode_tensors(np.full((1, 2, 2, 3), 9, np.uint8), "p"), token).json()
    assert (answer["reward"], answer["scores"]) == ("benchmarks.timed_scorer:create", [9.0])


@pytest.mark.parametrize(
    ("app", "error", "says"),
    [
        ("nope", ValueError, "no scorer 'nope'"),
        ("benchmarks.timed_scorer:nope", ValueError, "benchmarks.timed_scorer has no nope"),
        ("benchmarks.nope:create", ValueError, "no scorer 'benchmarks.nope:create'"),
        ("operator:is_not", TypeError, r"operator:is_not\(\) returned bool, not a Scorer"),
    ],
)
def test_what_is_no_scorer_is_not_served(
    token_file: Path, app: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        create_app(ServerConfig(app=app, token_file=token_file))


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


def test_an_error_does_not_repeat_all_that_was_sent(serve_fake: Serve, token: str) -> None:
    body = json.dumps({"images": [ONE], "prompts": "p", "k" * 100_000: 1}).encode()
    response = post(serve_fake(), body, token, JSON_TYPE)
    refused(response, 422, "kkk")
    assert len(response.content) < 3000
