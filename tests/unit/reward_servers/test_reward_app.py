"""The HTTP application over a real socket: token, limits, errors, and life after each of them."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.protocol import JSON_TYPE, TENSOR_TYPE, ScoreResponse, ServerInfo
from reward_servers.server_config import ServerConfig
from reward_servers.wire import encode_json, encode_png, encode_tensors
from tests.unit.reward_servers.http_support import admitted, no_place_left, post, refused, until

Serve = Callable[..., str]
Images = NDArray[np.uint8]


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
        waiting = [pool.submit(admitted, url, encode_tensors(images[:1], "p"), token) for _ in range(3)]
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


def test_an_error_does_not_repeat_all_that_was_sent(serve_fake: Serve, token: str) -> None:
    body = json.dumps({"images": [ONE], "prompts": "p", "k" * 100_000: 1}).encode()
    response = post(serve_fake(), body, token, JSON_TYPE)
    refused(response, 422, "kkk")
    assert len(response.content) < 3000
