"""Bodies of POST /v1/score to images and back, under limits.

Two forms of the same request:
- JSON with base64 PNG, for people;
- safetensors with one tensor `images` (uint8, N x H x W x 3, RGB), prompts and metadata as JSON texts in
  `__metadata__`, for machines. Read without a copy.

Promises
- Counts, pixels and bytes are checked against `Limits` before an image is decoded or memory is taken for it:
  a PNG that says it is 30000 x 30000 is refused from its header.
- What does not fit raises ProtocolError with the status and a text that says what would be valid; nothing
  else is raised, whatever the bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError
from pydantic_core import from_json
from safetensors.numpy import save

from reward_servers.protocol import Limits, Metadata, ProtocolError, ScoreRequest, explained

Images = Sequence[NDArray[np.uint8]]
"""RGB images, each (H, W, 3); they may differ in size."""

_LENGTH_BYTES = 8
_PNG_MODES = ("RGB", "L", "P", "1")


@dataclass(frozen=True)
class ScoreCall:
    """A request in the form that scorers take: as many prompts and metadata as images."""

    images: Images
    prompts: Sequence[str]
    metadata: Sequence[Metadata]

    def __len__(self) -> int:
        return len(self.images)


def encode_tensors(
    images: NDArray[np.uint8],
    prompts: str | Sequence[str],
    metadata: Metadata | Sequence[Metadata] | None = None,
) -> bytes:
    """The binary body.

    Args:
        images: (N, H, W, 3) RGB.
        prompts: one for all images, or N.
        metadata: one for all images, or N.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    texts = {
        "prompts": json.dumps(prompts if isinstance(prompts, str) else list(prompts)),
        "metadata": json.dumps(
            metadata if metadata is None or isinstance(metadata, dict) else list(metadata)
        ),
    }
    return save({"images": np.ascontiguousarray(images)}, metadata=texts)


def encode_json(
    images: Images, prompts: str | Sequence[str], metadata: Metadata | Sequence[Metadata] | None = None
) -> bytes:
    """The JSON body, images as base64 PNG."""
    request = {
        "images": [base64.b64encode(encode_png(image)).decode("ascii") for image in images],
        "prompts": prompts if isinstance(prompts, str) else list(prompts),
        "metadata": {} if metadata is None else metadata,
    }
    return json.dumps(request).encode()


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """One (H, W, 3) RGB image as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_tensors(body: bytes, limits: Limits) -> ScoreCall:
    """Inverse of `encode_tensors`; the images are read-only views of `body`."""
    header = _header(body, limits)
    texts = header.pop("__metadata__", None)
    if not isinstance(texts, dict) or "prompts" not in texts:
        raise ProtocolError(422, "body: __metadata__ must hold prompts (and metadata) as JSON texts")
    if unknown := sorted(set(texts) - {"prompts", "metadata"}):
        raise ProtocolError(422, f"body: unknown __metadata__ {unknown}; valid: metadata, prompts")
    if set(header) != {"images"}:
        raise ProtocolError(422, f"body: expected one tensor 'images', found {sorted(header)}")
    images = _tensor(header["images"], body, limits)
    return _call(list(images), _text(texts, "prompts"), _text(texts, "metadata"), limits)


def decode_json(body: bytes, limits: Limits) -> ScoreCall:
    """Inverse of `encode_json`."""
    # Base64 has none of these: a body of nothing but `[],[],` would take twenty times its size.
    _check_other(sum(map(body.count, (b"[", b"{", b","))), limits)
    try:
        # Not model_validate_json, which lets NaN pass inside metadata.
        given = from_json(body, allow_inf_nan=False)
        if isinstance(given, dict) and isinstance(given.get("images"), list):
            images = sum(len(image) for image in given["images"] if isinstance(image, str))
            _check_other(len(body) - images, limits)
        request = ScoreRequest.model_validate(given)
    except ValidationError as error:
        raise ProtocolError(422, explained(error, "body")) from error
    except ValueError as error:
        raise ProtocolError(422, f"body is no JSON: {error}") from error
    _check_count(len(request.images), limits)
    files = [_base64(text, index) for index, text in enumerate(request.images)]
    opened = [_open_png(file, index, limits) for index, file in enumerate(files)]
    _check_total(sum(image.width * image.height for image in opened), limits)
    pixels = [_pixels(image, index) for index, image in enumerate(opened)]
    return _call(pixels, request.prompts, request.metadata, limits)


def _header(body: bytes, limits: Limits) -> dict[str, Any]:
    if len(body) < _LENGTH_BYTES:
        raise ProtocolError(422, f"body: {len(body)} bytes are no safetensors file")
    length = int.from_bytes(body[:_LENGTH_BYTES], "little")
    if length > limits.max_header_bytes:
        raise ProtocolError(413, f"body: header of {length} bytes; at most {limits.max_header_bytes}")
    if _LENGTH_BYTES + length > len(body):
        raise ProtocolError(422, f"body: header of {length} bytes in a body of {len(body)}: truncated?")
    try:
        header = from_json(body[_LENGTH_BYTES : _LENGTH_BYTES + length], allow_inf_nan=False)
    except ValueError as error:
        raise ProtocolError(422, f"body: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError(422, "body: the safetensors header is not an object")
    return header


def _tensor(entry: Any, body: bytes, limits: Limits) -> NDArray[np.uint8]:
    """(N, H, W, 3). Stricter than the format: one tensor that fills the rest of the body exactly."""
    if not isinstance(entry, dict) or entry.get("dtype") != "U8":
        found = entry.get("dtype") if isinstance(entry, dict) else entry
        raise ProtocolError(422, f"images: dtype must be U8 (0..255), found {found!r:.80}")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(422, f"images: shape must be [N, H, W, 3], found {shape!r:.80}")
    count, height, width, channels = shape
    if channels != 3:
        raise ProtocolError(422, f"images: expected 3 channels (RGB) last, found {channels}")
    _check_count(count, limits)
    _check_size(height, width, "images", limits)
    _check_total(count * height * width, limits)
    size = count * height * width * channels
    offset = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    if entry.get("data_offsets") != [0, size] or len(body) - offset != size:
        raise ProtocolError(422, f"images: {len(body) - offset} bytes of data; shape {shape} needs {size}")
    return np.frombuffer(body, dtype=np.uint8, offset=offset).reshape(shape)


def _text(texts: dict[str, Any], name: str) -> Any:
    if name not in texts:
        return None
    try:
        value = from_json(texts[name], allow_inf_nan=False)
        # What is too large for a float has become infinite.
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ProtocolError(422, f"{name}: not a JSON text: {error}") from error
    return value


def _base64(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(422, f"images[{index}]: not base64: {error}") from error


def _open_png(file: bytes, index: int, limits: Limits) -> Image.Image:
    """Reads the header only: pixels are not decoded before every size has been checked."""
    try:
        image = Image.open(BytesIO(file), formats=["PNG"])
    except UnidentifiedImageError as error:
        raise ProtocolError(422, f"images[{index}]: not a PNG file") from error
    except Image.DecompressionBombError as error:
        raise ProtocolError(413, f"images[{index}]: {error}") from error
    except Exception as error:
        raise ProtocolError(422, f"images[{index}]: broken PNG file: {error}") from error
    _check_size(image.height, image.width, f"images[{index}]", limits)
    if image.mode not in _PNG_MODES or image.has_transparency_data:
        raise ProtocolError(
            422, f"images[{index}]: mode {image.mode}; send 8-bit RGB, grey or palette without alpha"
        )
    if getattr(image, "is_animated", False):
        raise ProtocolError(422, f"images[{index}]: animated; send one picture")
    return image


def _pixels(image: Image.Image, index: int) -> NDArray[np.uint8]:
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        # Pillow raises what its decoders meet (OSError, SyntaxError, struct.error): all mean a broken file.
        raise ProtocolError(422, f"images[{index}]: broken PNG file: {error}") from error


def _call(images: Images, prompts: Any, metadata: Any, limits: Limits) -> ScoreCall:
    texts = _per_image(prompts, str, "prompts", len(images))
    longest = max((len(text) for text in texts), default=0)
    if longest > limits.max_prompt_chars:
        raise ProtocolError(413, f"prompts: one has {longest} characters; at most {limits.max_prompt_chars}")
    given = {} if metadata is None else metadata
    return ScoreCall(images, texts, _per_image(given, dict, "metadata", len(images)))


def _per_image(value: Any, kind: type, name: str, count: int) -> list[Any]:
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
        raise ProtocolError(422, f"{name}: expected one {kind.__name__}, or a list of one an image")
    if len(value) != count:
        raise ProtocolError(422, f"{name}: {len(value)} for {count} images; give one, or one an image")
    return list(value)


def _check_count(count: int, limits: Limits) -> None:
    if count < 1:
        raise ProtocolError(422, "images: none given")
    if count > limits.max_images:
        raise ProtocolError(413, f"images: {count}; at most {limits.max_images} in a request")


def _check_other(size: int, limits: Limits) -> None:
    if size > limits.max_header_bytes:
        raise ProtocolError(
            413, f"body: more than {limits.max_header_bytes} bytes beside images, which is the limit"
        )


def _check_size(height: int, width: int, place: str, limits: Limits) -> None:
    if height < 1 or width < 1:
        raise ProtocolError(422, f"{place}: {width} x {height} pixels")
    if max(height, width) > limits.max_side or height * width > limits.max_pixels:
        raise ProtocolError(
            413,
            f"{place}: {width} x {height} pixels; at most {limits.max_pixels}, and {limits.max_side} a side",
        )


def _check_total(pixels: int, limits: Limits) -> None:
    if pixels > limits.max_total_pixels:
        raise ProtocolError(413, f"images: {pixels} pixels together; at most {limits.max_total_pixels}")
