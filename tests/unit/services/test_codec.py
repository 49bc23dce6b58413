from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.codec import (
    CorruptGroup,
    EncodedGroup,
    Group,
    WeightsEncoder,
    decode_group,
    decode_weights,
    encode_group,
    encode_weights,
    weights_digest,
)
from services.messages import GroupHeader, PolicyVersion, Prompt
from services.safetensors_layout import DTYPES, BadLayout, pack, views

DTYPE_LIST = list(DTYPES.values())


def header(**changes: Any) -> GroupHeader:
    fields: dict[str, Any] = {
        "run": "demo",
        "ordinal": 7,
        "attempt": 1,
        "version": PolicyVersion(epoch=0, step=3),
        "prompt": Prompt(text='a sign that says "K7QX"', metadata={"word": "K7QX"}),
        "seeds": (11, 12, 13),
        "rewards": {"ocr": (0.0, 0.5, 1.0)},
        "worker": "rollout-0",
        "sample_s": 1.0,
        "reward_s": 0.5,
    }
    return GroupHeader(**fields | changes)


def encoded() -> EncodedGroup:
    return encode_group(
        header(), {"latents": torch.randn(3, 4, 8, 8), "condition.pooled": torch.randn(6).half()}
    )


def decode(group: EncodedGroup) -> Group:
    return decode_group(group.header, group.payload, group.sha256, group_id="demo-7")


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    words = st.text(min_size=1, max_size=12).filter(lambda word: word != "__metadata__")
    names = draw(st.lists(words, unique=True, max_size=6))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPE_LIST))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        high = 1 if dtype is torch.bool else 255
        data = draw(st.lists(st.integers(0, high), min_size=size, max_size=size))
        tensors[name] = torch.tensor(data, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensors


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].flatten().view(torch.uint8).equal(right[name].flatten().view(torch.uint8))
        for name in left
    )


@given(tensor_dicts())
@settings(max_examples=40, deadline=None)
def test_layout_is_the_safetensors_package_s(tensors: dict[str, torch.Tensor]) -> None:
    ours = pack(tensors)
    assert same(safetensors.torch.load(ours), tensors)
    assert same(views(safetensors.torch.save(tensors, metadata={"format": "pt"})), tensors)
    assert same(decode_weights(encode_weights(tensors)), tensors)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_layout_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    head = len(data).to_bytes(8, "little")
    for candidate in (data, head + data, head + data + b"1234"):
        try:
            views(candidate)
        except BadLayout:
            continue


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}, "do not hold"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}, "expected 0"),
        ({"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, "truncated"),
        ({"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "non-negative"),
        ({"x": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}}, "integers"),
        ({"x": {"dtype": "F32", "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}, "impossible"),
        ({"x": {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}}, "broken entry"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "cover 8 of 16"),
        (
            {
                "x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "y": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
            },
            "expected 16",
        ),
        ([1], "expected an object"),
    ],
)
def test_layout_that_lies_is_refused(entries: Any, says: str) -> None:
    text = json.dumps(entries).encode()
    with pytest.raises(BadLayout, match=says):
        views(len(text).to_bytes(8, "little") + text + bytes(16))


def test_layout_names_each_tensor_once() -> None:
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f"{{{entry},{entry}}}".encode()
    with pytest.raises(BadLayout, match="twice"):
        views(len(text).to_bytes(8, "little") + text + bytes(4))


@pytest.mark.parametrize(
    "tensors", [{"__metadata__": torch.zeros(1)}, {"x": torch.zeros(1, dtype=torch.complex64)}]
)
def test_what_the_format_cannot_hold_is_not_written(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BadLayout, match=r"complex64|__metadata__"):
        pack(tensors)


def test_weights_reuse_the_buffer_and_share_it_when_read() -> None:
    first, second = {"w": torch.zeros(64)}, {"w": torch.ones(64)}
    buffer = encode_weights(first)
    again = encode_weights(second, buffer)
    assert again is buffer
    found = decode_weights(again)
    assert found["w"].equal(second["w"])
    encode_weights(first, buffer)
    assert found["w"].equal(first["w"])
    assert encode_weights({"w": torch.zeros(65)}, buffer) is not buffer


def test_weights_that_come_in_rows_are_those_that_come_whole() -> None:
    tensors = {"w": torch.randn(5, 3), "b": torch.randn(4), "none": torch.zeros(0, 2)}
    like = {name: torch.empty_like(tensor, dtype=torch.bfloat16) for name, tensor in tensors.items()}
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    encoder = WeightsEncoder(like)
    with pytest.raises(ValueError, match="3 tensors were not written"):
        encoder.finish()
    encoder.write("b", [tensors["b"]])
    encoder.write("none", [])
    encoder.write("w", tensors["w"].split([2, 0, 3]))
    payload, digest = encoder.finish()
    assert payload.tobytes() == encode_weights(rounded).tobytes()
    assert digest == weights_digest(rounded)
    for rows in (tensors["w"][:4], tensors["w"].repeat(2, 1)):
        with pytest.raises(ValueError, match=r"^w: .*30 bytes"):
            WeightsEncoder(like).write("w", [rows])


def test_group_survives_the_wire() -> None:
    group = encoded()
    opened = decode(group)
    assert opened.header == header()
    assert opened.group_id == "demo-7"
    assert same(opened.tensors, safetensors.torch.load(group.payload))
    assert (group.ordinal, group.version, group.worker) == (7, PolicyVersion(epoch=0, step=3), "rollout-0")


def test_a_payload_behind_its_header_in_one_piece_has_aligned_tensors() -> None:
    for worker in ("w", "rollout-0", "rollout-10"):
        group = encode_group(header().model_copy(update={"worker": worker}), {"latents": torch.ones(3, 4)})
        piece = memoryview(group.header + group.payload)
        opened = decode_group(group.header, piece[len(group.header) :], group.sha256, group_id="demo-7")
        assert opened.tensors["latents"].data_ptr() % 16 == 0


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_flipped_byte_is_noticed(data: st.DataObject) -> None:
    group = encoded()
    field = data.draw(st.sampled_from(["header", "payload"]))
    raw = bytearray(getattr(group, field))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptGroup, match=r"demo-7.*sha256"):
        decode(dataclasses.replace(group, **{field: bytes(raw)}))


def resigned(group: EncodedGroup, **changes: bytes) -> EncodedGroup:
    """Tampered with by someone who also made the digest match."""
    from hashlib import sha256

    changed = dataclasses.replace(group, **changes)
    return dataclasses.replace(changed, sha256=sha256(changed.header + changed.payload).hexdigest())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: dataclasses.replace(g, payload=g.payload[:-5]), "truncated"),
        (lambda g: resigned(g, payload=g.payload[:-5]), "not safetensors: truncated"),
        (lambda g: resigned(g, header=b"{}"), "header cannot be read: run"),
        (lambda g: resigned(g, header=b"\xff\xfe"), "header cannot be read"),
        (
            lambda g: resigned(g, header=g.header.replace(b'"ordinal":7', b'"ordinal":8')),
            "it is group demo-8",
        ),
        (
            lambda g: resigned(g, header=g.header.replace(b"[0.0,0.5,1.0]", b"[0.0,0.5]")),
            "2 scores for 3 samples",
        ),
        (lambda g: resigned(g, payload=pack({"x": torch.zeros(3)})), "no tensor 'latents'"),
        (lambda g: resigned(g, payload=pack({"latents": torch.zeros(2, 4)})), r"are \(2, 4\), expected \(3"),
        (
            lambda g: resigned(g, payload=pack({"latents": torch.full((3, 4), torch.nan)})),
            "'latents' has values that are not finite",
        ),
    ],
)
def test_what_is_wrong_with_a_group_is_named(change: Any, says: str) -> None:
    with pytest.raises(CorruptGroup, match=says) as caught:
        decode(change(encoded()))
    assert caught.value.group_id == "demo-7"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["latents", "condition.pooled"])
def test_a_group_that_is_not_finite_is_refused(name: str, value: float) -> None:
    tensors = {"latents": torch.zeros(3, 4), "condition.pooled": torch.zeros(6)}
    tensors[name].view(-1)[2] = value
    with pytest.raises(CorruptGroup, match=f"'{name}' has values that are not finite"):
        decode(encode_group(header(), tensors))


def test_large_but_finite_values_are_fine() -> None:
    decode(encode_group(header(), {"latents": torch.full((3, 64), 3e38)}))


def test_a_part_of_a_group_is_never_sent() -> None:
    with pytest.raises(CorruptGroup, match="one for each seed"):
        encode_group(header(), {"latents": torch.zeros(2, 4)})


@given(tensor_dicts(), st.randoms())
@settings(max_examples=40, deadline=None)
def test_digest_does_not_depend_on_order(tensors: dict[str, torch.Tensor], random: Any) -> None:
    names = list(tensors)
    random.shuffle(names)
    assert weights_digest({name: tensors[name].clone() for name in names}) == weights_digest(tensors)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(4), "b": torch.ones(3, 2)},
        {"a": torch.zeros(4), "c": torch.ones(2, 3)},
        {"a": torch.zeros(4), "b": torch.ones(2, 3).double()},
        {"a": torch.zeros(4).int(), "b": torch.ones(2, 3)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0]), "b": torch.ones(2, 3)},
        {"a": torch.zeros(4)},
    ],
)
def test_digest_sees_names_dtypes_shapes_and_bytes(other: dict[str, torch.Tensor]) -> None:
    assert weights_digest(other) != weights_digest({"a": torch.zeros(4), "b": torch.ones(2, 3)})


def test_digest_does_not_depend_on_memory_layout() -> None:
    square = torch.arange(12.0).reshape(3, 4)
    assert weights_digest({"w": square.t().contiguous().t()}) == weights_digest({"w": square})
