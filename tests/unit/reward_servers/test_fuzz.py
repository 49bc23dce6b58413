"""A server under made-up requests: never a 500 that nobody asked for, always an ErrorBody, alive afterwards.

Schemathesis makes requests from the OpenAPI document, right ones and wrong ones; hypothesis makes binary
bodies that are nearly right. The number of cases is bounded, and they are the same on every run.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.specs.openapi.checks import positive_data_acceptance

from benchmarks.timed_scorer import TIMED
from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.openapi import document
from reward_servers.protocol import (
    JSON_TYPE,
    STATUS_NAMES,
    TENSOR_TYPE,
    ErrorBody,
    Limits,
    ProtocolError,
    ScoreResponse,
)
from reward_servers.server_config import ServerConfig
from reward_servers.wire import decode_tensors, encode_png, encode_tensors

LIMITS = Limits(
    max_images=4, max_side=64, max_pixels=1024, max_total_pixels=4096, max_prompt_chars=50,
    max_body_bytes=32 * 1024, max_header_bytes=2048,
)  # fmt: skip
TOKEN = "a-token-for-tests-only"
FEW = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
"""The same cases on every run; how many is said where it is used."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("fuzz") / "token"
    file.touch(0o600)
    file.write_text(TOKEN)
    config = ServerConfig(app=TIMED, args={"image_s": 0.0}, token_file=file, limits=LIMITS, max_pending=1)
    with LocalServer(create_app(config)) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=20) as client:
        yield client


def post(client: httpx.Client, body: bytes, kind: str = TENSOR_TYPE) -> httpx.Response:
    return client.post("/v1/score", content=body, headers={"Content-Type": kind})


def alive(client: httpx.Client) -> bool:
    """It still scores, with the one place that it has."""
    body = encode_tensors(np.full((1, 2, 2, 3), 7, np.uint8), "p")
    return post(client, body).json()["scores"] == [7.0]


def check(response: httpx.Response) -> None:
    """An answer of the protocol, and no failure of the server."""
    assert response.headers["content-type"] == JSON_TYPE
    if response.status_code == 200:
        ScoreResponse.model_validate_json(response.content)
        return
    assert 400 <= response.status_code < 500, response.text
    body = ErrorBody.model_validate_json(response.content)
    assert body.error == STATUS_NAMES[response.status_code]
    assert body.detail


# --- binary bodies ------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(max_size=60)
prompt_values = texts | st.lists(texts, max_size=5) | json_values
metadata_values = st.dictionaries(st.text(max_size=5), json_values, max_size=2)
numbers = st.integers(-2, 70) | st.sampled_from([2**31, 2**63, -(2**63), 10**30]) | st.floats()
right_shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.just(3)).map(list)
near_shapes = st.builds(
    lambda shape, place, value: [*shape[:place], value, *shape[place + 1 :]],
    right_shapes, st.integers(0, 3), st.integers(0, 70) | numbers | json_values,
)  # fmt: skip
wrong_shapes = near_shapes | near_shapes | st.lists(numbers, max_size=6) | json_values
FAULTS = (
    "none",
    "shape",
    "dtype",
    "offsets",
    "header",
    "texts",
    "prompts",
    "metadata",
    "length",
    "size",
    "bytes",
)


@st.composite
def binary_bodies(draw: Callable[..., Any]) -> bytes:
    """A safetensors file with at most one thing wrong, any of FAULTS."""
    fault = draw(st.sampled_from(FAULTS))
    shape = draw(wrong_shapes if fault == "shape" else right_shapes)
    size = _size(shape)
    entry: dict[str, Any] = {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}
    if fault == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F32", "F64", "BF16", "I64", "BOOL", "u8"]) | json_values)
    if fault == "offsets":
        entry["data_offsets"] = draw(st.lists(numbers, max_size=3) | json_values)
    given: Any = {"prompts": json.dumps(draw(prompt_values if fault == "prompts" else texts))}
    if fault == "metadata":
        given["metadata"] = json.dumps(draw(st.lists(metadata_values, max_size=4) | json_values))
    if fault == "texts":
        given = draw(
            json_values | st.dictionaries(st.sampled_from(["prompts", "metadata", "x"]), json_values)
        )
    header: dict[str, Any] = {"__metadata__": given, "images": entry}
    if fault == "header":
        header |= draw(st.dictionaries(st.sampled_from(["images", "x"]), json_values, min_size=1))
    written = json.dumps(header).encode()
    wrong_lengths = st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(written))
    length = draw(wrong_lengths) if fault == "length" else len(written)
    data = bytes(max(0, size + draw(st.integers(-5, 500)))) if fault == "size" else bytes(size)
    body = bytearray(struct.pack("<Q", length) + written + data)
    if fault == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


def _size(shape: Any) -> int:
    """Bytes of a shape that is small enough to be sent."""
    if not isinstance(shape, list) or not all(isinstance(n, int) and 0 <= n < 64 for n in shape):
        return 12
    return min(int(np.prod(shape)), 16_000)


@settings(FEW, max_examples=400)
@given(binary_bodies())
def test_a_binary_body_is_read_or_refused(body: bytes) -> None:
    try:
        call = decode_tensors(body, LIMITS)
    except ProtocolError as error:
        assert error.status in (413, 422)
        return
    assert 1 <= len(call.images) == len(call.prompts) == len(call.metadata)
    assert all(image.dtype == np.uint8 and image.shape[2:] == (3,) for image in call.images)
    assert all(isinstance(prompt, str) for prompt in call.prompts)


def test_the_bodies_made_here_reach_both_outcomes() -> None:
    """The fuzz above would prove nothing if it never got past the first check."""
    outcomes: dict[str, int] = {}

    @settings(FEW, max_examples=400)
    @given(binary_bodies())
    def count(body: bytes) -> None:
        try:
            decode_tensors(body, LIMITS)
            outcome = "read"
        except ProtocolError as error:
            outcome = error.detail.partition(":")[0]
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    count()
    assert {"read", "body", "images", "prompts", "metadata"} <= set(outcomes), outcomes


@settings(FEW, max_examples=150)
@given(
    body=binary_bodies() | st.binary(max_size=100),
    kind=st.sampled_from([TENSOR_TYPE, TENSOR_TYPE, JSON_TYPE]),
)
def test_a_server_survives_every_binary_body(client: httpx.Client, body: bytes, kind: str) -> None:
    check(post(client, body, kind))
    assert alive(client)


# --- the OpenAPI document -----------------------------------------------------------------------------------

small_images = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)).map(
    lambda size: np.full((*size, 3), 128, np.uint8)
)
schemathesis.openapi.media_type(
    TENSOR_TYPE,
    st.builds(encode_tensors, small_images, texts, metadata_values) | binary_bodies(),
)
schemathesis.openapi.format(
    "png", small_images.map(lambda images: base64.b64encode(encode_png(images[0])).decode("ascii"))
)


def _fuzzed() -> Any:
    """The document, in which the images of a right JSON body are PNG files."""
    made = document()
    images = made["components"]["schemas"]["ScoreRequest"]["properties"]["images"]
    images["items"] = {"type": "string", "format": "png"}
    return schemathesis.openapi.from_dict(made)


schema = _fuzzed()
# A wrong body may be too large before it is wrong.
rejection = schema.config.checks.negative_data_rejection
rejection.expected_statuses = [*rejection.expected_statuses, "413"]


@schema.parametrize()
@settings(FEW, max_examples=60)
def test_the_server_is_as_the_document_says(case: Case, url: str, client: httpx.Client) -> None:
    response = case.call(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"})
    # A schema cannot say what a PNG file is, or that there are as many prompts as images.
    case.validate_response(response, excluded_checks=[positive_data_acceptance])
    assert alive(client)
