"""Bodies survive the wire, and nothing but ProtocolError comes out of a bad one."""

import base64
import json
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from reward_servers.protocol import Limits, ProtocolError
from reward_servers.wire import decode_json, decode_tensors, encode_json, encode_png, encode_tensors

LIMITS = Limits(max_images=8, max_side=64, max_pixels=2048, max_total_pixels=8192, max_prompt_chars=100)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.just(3))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
metadata_values = st.dictionaries(st.text(max_size=5), json_values, max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    images=shapes.flatmap(lambda shape: arrays(np.uint8, shape)),
    prompt=st.text(max_size=30),
    metadata=metadata_values,
)
def test_both_bodies_round_trip(images: NDArray[np.uint8], prompt: str, metadata: dict[str, Any]) -> None:
    for call in (
        decode_tensors(encode_tensors(images, prompt, metadata), LIMITS),
        decode_json(encode_json(list(images), prompt, metadata), LIMITS),
    ):
        assert np.array_equal(np.stack(call.images), images)
        assert list(call.prompts) == [prompt] * len(images)
        assert list(call.metadata) == [metadata] * len(images)


def test_one_prompt_and_metadata_an_image(images: NDArray[np.uint8]) -> None:
    prompts, metadata = list("abcde"), [{"n": n} for n in range(5)]
    call = decode_tensors(encode_tensors(images, prompts, metadata), LIMITS)
    assert (list(call.prompts), list(call.metadata)) == (prompts, metadata)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(body: bytes) -> None:
    for decode in (decode_tensors, decode_json):
        with pytest.raises(ProtocolError):
            decode(body, LIMITS)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_damaged_body_is_refused_or_whole(position: int, value: int, cut: int) -> None:
    body = bytearray(encode_tensors(np.zeros((2, 3, 3, 3), np.uint8), "p", {"k": [1]}))
    body[position % len(body)] = value
    try:
        call = decode_tensors(bytes(body[: len(body) - cut]), LIMITS)
    except ProtocolError:
        return
    assert cut == 0
    assert len(call.images) == len(call.prompts) == len(call.metadata)
    assert sum(image.size for image in call.images) == 54


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TEXTS = {"prompts": '"p"', "metadata": "{}"}


def one(**changes: Any) -> dict[str, Any]:
    entry = {"dtype": "U8", "shape": [1, 2, 2, 3], "data_offsets": [0, 12]} | changes
    return {"__metadata__": TEXTS, "images": entry}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 422, "no safetensors"),
        (tensors({}, length=2**63), 413, "header"),
        (tensors({}, length=500), 422, "truncated"),
        (tensors(b"[" * 5000), 422, "not JSON"),
        (tensors([]), 422, "not an object"),
        (tensors({"images": one()["images"]}, bytes(12)), 422, "__metadata__"),
        (
            tensors({"__metadata__": {"prompts": "nope"}, "images": one()["images"]}, bytes(12)),
            422,
            "prompts",
        ),
        (
            tensors({"__metadata__": {"prompts": '["p", 1]'}, "images": one()["images"]}, bytes(12)),
            422,
            "prompts",
        ),
        (tensors({"__metadata__": TEXTS | {"seed": "1"}, "images": one()["images"]}, bytes(12)), 422, "seed"),
        (tensors({"__metadata__": TEXTS, "latents": one()["images"]}, bytes(12)), 422, "'images'"),
        (
            tensors({"__metadata__": {"prompts": '["p", "q"]'}, "images": one()["images"]}, bytes(12)),
            422,
            "2 for 1",
        ),
        (
            tensors(
                {"__metadata__": {"prompts": json.dumps("p" * 101)}, "images": one()["images"]}, bytes(12)
            ),
            413,
            "101",
        ),
        (
            tensors({"__metadata__": TEXTS | {"metadata": "[1]"}, "images": one()["images"]}, bytes(12)),
            422,
            "metadata",
        ),
        (
            tensors({"__metadata__": TEXTS | {"metadata": "NaN"}, "images": one()["images"]}, bytes(12)),
            422,
            "metadata",
        ),
        (tensors(one(dtype="F32"), bytes(12)), 422, "U8"),
        (tensors(one(shape=[2, 2, 3]), bytes(12)), 422, "shape"),
        (tensors(one(shape=[1, 3, 2, 2]), bytes(12)), 422, "channels"),
        (tensors(one(shape=[1, 2, 2, 4]), bytes(16)), 422, "channels"),
        (tensors(one(shape=[0, 2, 2, 3]), b""), 422, "none given"),
        (tensors(one(shape=[1, 0, 2, 3]), b""), 422, "pixels"),
        (tensors(one(shape=[9, 2, 2, 3]), bytes(108)), 413, "at most 8"),
        (tensors(one(shape=[1, 65, 2, 3]), bytes(12)), 413, "64"),
        (tensors(one(shape=[1, 60, 60, 3]), bytes(12)), 413, "2048"),
        (tensors(one(shape=[8, 32, 64, 3]), bytes(12)), 413, "together"),
        (tensors(one(shape=[True, 2, 2, 3]), bytes(12)), 422, "shape"),
        (tensors(one(shape=[-1, -2, 2, 3]), bytes(12)), 422, "shape"),
        (tensors(one(), bytes(11)), 422, "11 bytes"),
        (tensors(one(), bytes(13)), 422, "13 bytes"),
        (tensors(one(data_offsets=[1, 13]), bytes(12)), 422, "data"),
    ],
)
def test_bad_binary_bodies(body: bytes, status: int, says: str) -> None:
    with pytest.raises(ProtocolError, match=says) as caught:
        decode_tensors(body, LIMITS)
    assert caught.value.status == status


def png(width: int, height: int) -> bytes:
    """A PNG file that says it has that size, and holds next to nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def text(file: bytes) -> str:
    return base64.b64encode(file).decode()


@pytest.mark.parametrize(
    ("request_body", "status", "says"),
    [
        ({"images": [], "prompts": "p"}, 422, "none given"),
        ({"images": [text(png(2, 2))] * 9, "prompts": "p"}, 413, "at most 8"),
        ({"images": ["%%%"], "prompts": "p"}, 422, "base64"),
        ({"images": [text(b"GIF89a nothing")], "prompts": "p"}, 422, "not a PNG"),
        ({"images": [text(png(2, 2))], "prompts": "p"}, 422, "broken PNG"),
        ({"images": [text(png(30000, 30000))], "prompts": "p"}, 413, "30000|exceeds limit"),
        ({"images": [text(png(2000, 2000))], "prompts": "p"}, 413, "2000 x 2000"),
        ({"images": [text(png(2, 2))], "prompts": ["p", "q"]}, 422, "broken PNG|2 for 1"),
        ({"prompts": "p"}, 422, "images"),
        ({"images": [text(png(2, 2))], "prompts": "p", "seed": 1}, 422, "seed"),
        ({"images": [1.5], "prompts": "p"}, 422, "images"),
        ("not an object", 422, "body"),
        ({"images": [], "prompts": "p", "metadata": {"weight": float("nan")}}, 422, "no JSON"),
    ],
)
def test_bad_json_bodies(request_body: Any, status: int, says: str) -> None:
    with pytest.raises(ProtocolError, match=says) as caught:
        decode_json(json.dumps(request_body).encode(), LIMITS)
    assert caught.value.status == status


def test_a_bomb_is_refused_before_any_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image, *args: Any) -> None:
        raise AssertionError("an image was decoded before all sizes had been checked")

    good = text(encode_png(np.zeros((2, 2, 3), np.uint8)))
    monkeypatch.setattr(Image.Image, "convert", decode)
    with pytest.raises(ProtocolError) as caught:
        decode_json(json.dumps({"images": [good, text(png(60, 60))], "prompts": "p"}).encode(), LIMITS)
    assert caught.value.status == 413


def test_an_image_with_alpha_is_refused() -> None:
    file = as_png(Image.new("RGBA", (2, 2)))
    with pytest.raises(ProtocolError, match="mode RGBA"):
        decode_json(json.dumps({"images": [text(file)], "prompts": "p"}).encode(), LIMITS)


def test_float_images_are_not_encoded() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_tensors(np.zeros((1, 2, 2, 3), np.float32), "p")  # type: ignore[arg-type]


def as_png(image: Image.Image, **how: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", **how)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (as_png(Image.new("P", (2, 2)), transparency=0), "without alpha"),
        (as_png(Image.new("RGB", (2, 2)), transparency=(0, 0, 0)), "without alpha"),
        (as_png(Image.fromarray(np.full((2, 2), 300, np.uint16))), "8-bit"),
        (
            as_png(Image.new("RGB", (2, 2)), save_all=True, append_images=[Image.new("RGB", (2, 2), "red")]),
            "animated",
        ),
    ],
)
def test_a_png_that_leaves_open_what_it_shows_is_refused(file: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says) as caught:
        decode_json(json.dumps({"images": [text(file)], "prompts": "p"}).encode(), LIMITS)
    assert caught.value.status == 422


def test_what_is_no_image_in_a_json_body_has_the_limit_of_a_header() -> None:
    """A list of two bytes takes some sixty in memory: those are counted before anything is parsed."""
    limits = Limits(max_header_bytes=1024, max_prompt_chars=10_000)
    image = text(encode_png(np.zeros((40, 40, 3), np.uint8)))
    big = {"images": [image] * 20, "prompts": "p" * 500, "metadata": {"a": [[]] * 50}}
    assert len(decode_json(json.dumps(big).encode(), limits)) == 20, "images are not counted"
    others: list[dict[str, Any]] = [
        {"metadata": {"a": [[]] * 600}},
        {"metadata": {"a": "x" * 1025}},
        {"prompts": "p" * 1025},
    ]
    for other in others:
        with pytest.raises(ProtocolError, match="1024 bytes beside images") as caught:
            decode_json(json.dumps({"images": [image], "prompts": "p"} | other).encode(), limits)
        assert caught.value.status == 413


@pytest.mark.parametrize("number", ["1e999", "-1e999", "Infinity", "NaN"])
def test_numbers_of_metadata_are_finite_in_both_forms(number: str) -> None:
    metadata = f'{{"n": [{number}]}}'
    binary = tensors({"__metadata__": TEXTS | {"metadata": metadata}, "images": one()["images"]}, bytes(12))
    image = text(encode_png(np.zeros((2, 2, 3), np.uint8)))
    with pytest.raises(ProtocolError, match="metadata"):
        decode_tensors(binary, LIMITS)
    with pytest.raises(ProtocolError, match=r"metadata|no JSON"):
        decode_json(f'{{"images": ["{image}"], "prompts": "p", "metadata": {metadata}}}'.encode(), LIMITS)
