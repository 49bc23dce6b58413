"""Groups and weights as bytes and back: whole and proven, or an error that says what is wrong.

Promises
- A group travels as JSON (its header), safetensors (its tensors) and one sha256 over both.
- `decode_group` returns a whole group or raises `CorruptGroup` with the group's name; it never guesses.
- `weights_digest` depends on names, dtypes, shapes and bytes of the tensors, on nothing else.
- Decoded tensors share memory with the bytes they came from: read them, do not write to them.

Two digests, on purpose. A group crosses a server that others can reach, so its digest is sha256. Weights stay
inside the Ray cluster, where whoever can write to the object store can run code anyway: their digest guards
against mix-ups and damage, is computed by each worker at each install, and at 75 MB for eight workers sha256
(1 GB/s on the CPUs at hand) took several times as long as the copies. It is sha256 over names, dtypes, shapes
and the 128-bit XXH3 of each tensor's bytes: 20 GB/s, 2^-128 for an accident to pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import xxhash
from pydantic import ValidationError

from services.messages import GroupHeader, PolicyVersion
from services.safetensors_layout import BadLayout, Bytes, pack, pack_into, prepared, tensor_bytes, views

COPY_PIECE_BYTES = 512 * 1024
"""Source and copy fit into 1 MiB of cache together; smaller pieces cost more calls than they save misses."""


class CorruptGroup(ValueError):
    """A group that is not whole, not readable or not the one it says it is."""

    def __init__(self, group_id: str, reason: str) -> None:
        super().__init__(f"group {group_id}: {reason}")
        self.group_id = group_id
        self.reason = reason


@dataclass(frozen=True)
class Group:
    """The G samples of one group task, whole.

    `tensors` holds `latents` (G, ...) in the order of `header.seeds`, and `condition.*` of one sample.
    """

    header: GroupHeader
    tensors: dict[str, torch.Tensor]

    @property
    def group_id(self) -> str:
        return _id(self.header)


@dataclass(frozen=True)
class EncodedGroup:
    """A group as it travels. `ordinal`, `version` and `worker` repeat the header for the queue's own use."""

    header: bytes
    """JSON of a GroupHeader, filled up with spaces to a multiple of 64 bytes."""
    payload: bytes
    """safetensors."""
    sha256: str
    """Hex, over header and payload."""
    ordinal: int
    version: PolicyVersion
    worker: str

    @property
    def size(self) -> int:
        return len(self.header) + len(self.payload)


def _sha256(header: bytes, payload: bytes | memoryview) -> str:
    digest = hashlib.sha256(header)
    digest.update(payload)
    return digest.hexdigest()


def _check_whole(header: GroupHeader, tensors: Mapping[str, torch.Tensor]) -> None:
    latents = tensors.get("latents")
    if latents is None:
        raise CorruptGroup(_id(header), f"has no tensor 'latents', only {sorted(tensors)}")
    if latents.dim() < 2 or latents.shape[0] != header.group_size:
        raise CorruptGroup(
            _id(header),
            f"latents are {tuple(latents.shape)}, expected ({header.group_size}, ...): one for each seed",
        )


def _check_finite(header: GroupHeader, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        # A sum is one pass without a temporary; only one that overflows needs the exact look.
        finite = not tensor.is_floating_point() or math.isfinite(tensor.sum().item())
        if not finite and not bool(torch.isfinite(tensor).all()):
            raise CorruptGroup(_id(header), f"tensor {name!r} has values that are not finite")


def _id(header: GroupHeader) -> str:
    return f"{header.run}-{header.ordinal}"


def encode_group(header: GroupHeader, tensors: Mapping[str, torch.Tensor]) -> EncodedGroup:
    """Raises `CorruptGroup` for a group that is not whole. Whether it is finite, its reader looks."""
    _check_whole(header, tensors)
    text = header.model_dump_json().encode()
    # A payload that follows in the same piece of memory keeps its tensors aligned.
    text += b" " * (-len(text) % 64)
    payload = pack(tensors)
    return EncodedGroup(
        header=text,
        payload=payload,
        sha256=_sha256(text, payload),
        ordinal=header.ordinal,
        version=header.version,
        worker=header.worker,
    )


def decode_group(header: bytes, payload: bytes | memoryview, sha256: str, *, group_id: str) -> Group:
    """Verify and open a group.

    Args:
        group_id: what the carrier says it is, `RUN-ORDINAL`; the header must agree.

    Raises:
        CorruptGroup: digest, header, layout or tensors are wrong.
    """
    found = _sha256(header, payload)
    if found != sha256:
        raise CorruptGroup(
            group_id,
            f"sha256 of {len(header)} + {len(payload)} bytes is {found[:16]}..., announced {sha256[:16]}...: "
            "truncated or tampered with",
        )
    try:
        parsed = GroupHeader.model_validate_json(header)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "whole"
        raise CorruptGroup(group_id, f"header cannot be read: {place}: {first['msg']}") from error
    if _id(parsed) != group_id:
        raise CorruptGroup(group_id, f"its header says it is group {_id(parsed)}")
    try:
        tensors = views(payload)
    except BadLayout as error:
        raise CorruptGroup(group_id, f"payload is not safetensors: {error}") from error
    _check_whole(parsed, tensors)
    _check_finite(parsed, tensors)
    return Group(parsed, tensors)


class WeightsDigest:
    """`weights_digest`, tensor by tensor in any order."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._note(name, tensor, xxhash.xxh3_128_hexdigest(tensor_bytes(tensor).data))

    def copy_rows(
        self, name: str, like: torch.Tensor, rows: Iterable[torch.Tensor], destination: Bytes
    ) -> None:
        """Copy a tensor's bytes and add what then lies at the destination.

        Piece by piece, each hashed while it is in the cache: half the time of a copy and a hash after it.

        Args:
            like: has its dtype and its shape; its values are not looked at.
            rows: the tensor, in one piece or in several of some rows each, from the first to the last.

        Raises:
            ValueError: the pieces have more or fewer bytes.
        """
        content, at = xxhash.xxh3_128(), 0
        for piece in rows:
            source = tensor_bytes(piece)
            if at + source.size > destination.size:
                raise ValueError(f"{name}: more than its {destination.size} bytes")
            for begin in range(0, source.size, COPY_PIECE_BYTES):
                part = source[begin : begin + COPY_PIECE_BYTES]
                copied = destination[at : at + part.size]
                copied[:] = part
                content.update(copied.data)
                at += part.size
        if at != destination.size:
            raise ValueError(f"{name}: {at} of its {destination.size} bytes")
        self._note(name, like, content.hexdigest())

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(self._lines[name] for name in sorted(self._lines)).encode()).hexdigest()

    def _note(self, name: str, tensor: torch.Tensor, content: str) -> None:
        self._lines[name] = _described(name, tensor.dtype, tensor.shape) + content + "\n"


@lru_cache(maxsize=16384)
def _described(name: str, dtype: torch.dtype, shape: torch.Size) -> str:
    # The same tensors come with every version of the weights.
    return f"{len(name)} {name} {dtype} {tuple(shape)} "


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of named tensors, hex; the same for any insertion order, device and memory layout.

    >>> a, b = torch.zeros(2), torch.ones(3)
    >>> weights_digest({"a": a, "b": b}) == weights_digest({"b": b, "a": a})
    True
    """
    digest = WeightsDigest()
    for name, tensor in tensors.items():
        digest.add(name, tensor)
    return digest.hexdigest()


def encode_weights(tensors: Mapping[str, torch.Tensor], buffer: Bytes | None = None) -> Bytes:
    """Weights as the bytes of a safetensors file, in `buffer` again if it has the size."""
    return pack_into(tensors, buffer)


class WeightsEncoder:
    """Weights as the bytes of a safetensors file, of which the writer never holds more than a tensor.

    Args:
        like: name -> a tensor with the dtype and the shape that travel, on any device (`meta`, say).
        buffer: written to again if it has the size.
    """

    def __init__(self, like: Mapping[str, torch.Tensor], buffer: Bytes | None = None) -> None:
        self._like, self._digest = like, WeightsDigest()
        signature = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in like.items())
        self._buffer, self._missing = prepared(signature, buffer)

    def write(self, name: str, rows: Iterable[torch.Tensor]) -> None:
        """One tensor, in pieces of some rows each; cast to the dtype that travels.

        Raises:
            ValueError: they are not all of its rows.
        """
        like = self._like[name]
        place = self._missing.pop(name)
        self._digest.copy_rows(name, like, (piece.detach().to(like.dtype) for piece in rows), place)

    def finish(self) -> tuple[Bytes, str]:
        """The bytes, and the digest of the tensors in them.

        Raises:
            ValueError: a tensor has not been written.
        """
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, first {min(self._missing)!r}")
        return self._buffer, self._digest.hexdigest()


def decode_weights(buffer: bytes | bytearray | memoryview | Bytes) -> dict[str, torch.Tensor]:
    """Inverse of `encode_weights`, sharing the buffer's memory.

    Raises:
        BadLayout: the buffer is not a whole safetensors file.
    """
    return views(buffer)
