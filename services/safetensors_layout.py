"""The safetensors layout on memory we already have: one copy to write, none to read.

Promises
- What `pack` and `pack_into` write, `safetensors.torch.load` reads, and the other way round.
- `views` copies nothing: its tensors share the buffer's memory and must not be written to.
- A header that lies (offsets outside the buffer, holes, overlaps, a wrong size, an unknown dtype, a name
  given twice) raises `BadLayout` before any tensor exists.

The safetensors package copies each tensor two to three times; at 75 MB of weights for eight workers these
copies, and the page faults of fresh memory, were most of the time of a publish.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]
MAX_HEADER_BYTES = 100_000_000
ALIGNMENT_BYTES = 64
"""Of memory that torch allocates."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UNKNOWN_TO_NUMPY = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
}
"""Of these numpy makes a view in less than half the time."""
CACHED_HEADER_BYTES = 64 * 1024
"""Checked layouts of headers up to this size are remembered: the groups of a run all have the same."""

Signature = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
Layout = tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
"""Name, dtype, shape, first byte in the data, number of elements."""

# Buffers that arrive from the network or the object store are read-only; `views` says that nobody writes.
warnings.filterwarnings("ignore", message=r"The given (buffer|NumPy array) is not writ", category=UserWarning)


class BadLayout(ValueError):
    """The bytes are not a safetensors file; the text says where they stop being one."""


def tensor_bytes(tensor: torch.Tensor) -> Bytes:
    """The bytes of a tensor, row-major, without a copy where it is contiguous and on the CPU."""
    tensor = tensor.detach()
    if not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.cpu().contiguous()
    if tensor.dtype in UNKNOWN_TO_NUMPY:
        tensor = tensor.reshape(-1).view(torch.uint8)
    flat: Bytes = tensor.numpy().reshape(-1).view(np.uint8)
    return flat


@lru_cache(maxsize=64)
def _plan(signature: Signature) -> tuple[bytes, tuple[str, ...], int]:
    """Header, order of the tensors, bytes of their data. The groups of a run all have the same."""
    # Widest dtype first keeps every tensor aligned to its element, as the package itself orders them.
    order = sorted(signature, key=lambda item: (-item[1].itemsize, item[0]))
    entries: dict[str, Any] = {}
    begin = 0
    for name, dtype, shape in order:
        if name == "__metadata__":
            raise BadLayout("no tensor can be named '__metadata__': the format keeps that name")
        if dtype not in CODES:
            raise BadLayout(f"tensor {name!r} has dtype {dtype}; safetensors holds {', '.join(DTYPES)}")
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The data begins at a multiple of 64 bytes of the file, as kernels like it.
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text, tuple(name for name, _, _ in order), begin


def _signature(tensors: Mapping[str, torch.Tensor]) -> Signature:
    return tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    head, order, _ = _plan(_signature(tensors))
    return b"".join([head, *(tensor_bytes(tensors[name]).data for name in order)])


def pack_into(tensors: Mapping[str, torch.Tensor], buffer: Bytes | None = None) -> Bytes:
    """Tensors as a uint8 array, written into `buffer` if it has the very size, else into a new one.

    Memory that was touched before takes a copy several times as fast as fresh pages do.
    """
    buffer, places = prepared(_signature(tensors), buffer)
    for name, place in places.items():
        place[:] = tensor_bytes(tensors[name])
    return buffer


def prepared(signature: Signature, buffer: Bytes | None = None) -> tuple[Bytes, dict[str, Bytes]]:
    """A uint8 array with all of a file but the tensors' bytes, and the place of these, by name.

    Args:
        signature: name, dtype and shape of each tensor.
        buffer: taken if it has the very size.
    """
    head, order, size = _plan(signature)
    total = len(head) + size
    if buffer is None or buffer.size != total or not buffer.flags.writeable:
        buffer = np.empty(total, dtype=np.uint8)
    buffer[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, dtype, shape in signature}
    begin, places = len(head), {}
    for name in order:
        places[name] = buffer[begin : begin + sizes[name]]
        begin += sizes[name]
    return buffer, places


def views(buffer: bytes | bytearray | memoryview | Bytes) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, sharing its memory: read, do not write.

    Raises:
        BadLayout: the buffer is not a whole, well-formed file.
    """
    raw = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer).cast("B")
    start = _header_end(raw)
    head = bytes(raw[8:start])
    layout = (_cached_layout if len(head) <= CACHED_HEADER_BYTES else _layout)(head, len(raw) - start)
    tensors = {}
    for name, dtype, shape, begin, count in layout:
        if count == 0:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        known = NUMPY_DTYPES.get(dtype)
        if known is not None:
            tensors[name] = torch.from_numpy(np.ndarray(shape, known, raw, start + begin))
        else:
            tensors[name] = torch.frombuffer(raw, dtype=dtype, count=count, offset=start + begin).view(shape)
    return tensors


def _header_end(raw: memoryview) -> int:
    if len(raw) < 8:
        raise BadLayout(f"truncated: {len(raw)} bytes, a header needs at least 8")
    size = int.from_bytes(raw[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(raw) - 8):
        raise BadLayout(f"truncated: the header claims {size} bytes, {len(raw) - 8} are there")
    return 8 + size


def _layout(head: bytes, data_size: int) -> Layout:
    """Where each tensor is, checked to the last byte."""
    try:
        entries = json.loads(head, object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadLayout(f"the header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise BadLayout(f"the header is a {type(entries).__name__}, expected an object")
    entries.pop("__metadata__", None)
    spans = sorted(_span(name, entry, data_size) for name, entry in entries.items())
    end = 0
    for begin, finish, name in spans:
        if begin != end:
            raise BadLayout(f"tensor {name!r} begins at byte {begin} of the data, expected {end}")
        end = finish
    if end != data_size:
        raise BadLayout(f"tensors cover {end} of {data_size} data bytes")
    dtypes = {name: DTYPES[entry["dtype"]] for name, entry in entries.items()}
    return tuple(
        (name, dtypes[name], tuple(entries[name]["shape"]), begin, (finish - begin) // dtypes[name].itemsize)
        for begin, finish, name in spans
    )


_cached_layout = lru_cache(maxsize=64)(_layout)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadLayout("the header names something twice")
    return result


def _span(name: str, entry: Any, data_size: int) -> tuple[int, int, str]:
    try:
        dtype = DTYPES[entry["dtype"]]
        shape = entry["shape"]
        begin, finish = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadLayout(f"tensor {name!r} has a broken entry: {error!r}") from error
    numbers = [begin, finish, *shape] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise BadLayout(f"tensor {name!r} has a shape or offsets that are not small non-negative integers")
    if math.prod(max(size, 1) for size in shape) >= 2**48:
        raise BadLayout(f"tensor {name!r} has the impossible shape {shape}")
    if not begin <= finish <= data_size:
        raise BadLayout(f"truncated: tensor {name!r} is bytes {begin} to {finish} of {data_size}")
    if math.prod(shape) * dtype.itemsize != finish - begin:
        raise BadLayout(f"tensor {name!r}: {finish - begin} bytes do not hold {shape} of {entry['dtype']}")
    return begin, finish, name
