"""What scorers that are torch networks share: where weights come from, and how images become pixels.

Promises
- Weights come from a local directory or a hub id, at a revision if one is given; no code that lies beside
  them is run, and from a pickle only tensors and plain values are taken.
- A checkpoint that lacks a weight of the network, or has another shape, is refused: a scorer never answers
  with random numbers.
- Pixels take memory by the size of the network's input, whatever the shape of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from reward_servers.scorer import ScorerOptions

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT: Final = 16
"""Of longer images only the middle is resized: a line of pixels must not become gigabytes."""

Network = TypeVar("Network", bound=nn.Module)
Item = TypeVar("Item")
Crop = Literal["round", "floor"]


class NeuralOptions(ScorerOptions):
    """Arguments of every scorer that is a torch network."""

    revision: str | None = None
    """Commit, tag or branch, where the weights come from the hub."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations; the formula itself is computed in float32."""
    max_batch: int = Field(default=16, ge=1)
    """Images that go through the network at once."""

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def load_network(kind: type[Network], source: str, options: NeuralOptions, **more: Any) -> Network:
    """A frozen network in the format of transformers, on its device.

    Args:
        kind: class of transformers.
        source: local directory or hub id.
        more: for `from_pretrained`, such as `subfolder`.

    Raises:
        ValueError: it cannot be loaded, or the checkpoint lacks weights of the network.
    """
    load: Any = kind
    network: Network
    try:
        require_place(source)
        _require_kind(load, source, options.revision, **more)
        network, found = load.from_pretrained(
            source,
            revision=options.revision,
            dtype=options.torch_dtype,
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
    except Exception as error:
        raise ValueError(f"{source}: no {kind.__name__} could be loaded from there: {error}") from error
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} weights of {kind.__name__} are missing or of another shape, "
            f"such as {missing[0]}: this is the checkpoint of another network"
        )
    return frozen(network, options)


def _require_kind(kind: Any, source: str, revision: str | None, subfolder: str = "", **_: Any) -> None:
    """transformers would make a network of default size of another's configuration, and only warn."""
    expected = kind.config_class
    if expected.base_config_key:
        return  # A part of a network, which is loaded from the checkpoint of the whole.
    config, _ = expected.get_config_dict(source, revision=revision, subfolder=subfolder)
    found = config.get("model_type", expected.model_type)
    if found != expected.model_type:
        raise ValueError(f"it is a checkpoint of {found!r}, not of {expected.model_type!r}")


def require_place(source: str) -> None:
    """Refuse a path that is not there, which the hub would take for a misspelt id.

    Raises:
        ValueError: `source` can only be a local path, and nothing is there.
    """
    path = Path(source)
    if (path.is_absolute() or source.startswith(".") or len(path.parts) > 2) and not path.exists():
        raise ValueError(f"{source}: no such file or directory")


def weight_file(source: str, name: str, revision: str | None = None) -> Path:
    """Where a file of weights lies: `source` if it is a file, else `name` in that directory or hub id.

    Raises:
        ValueError: there is none.
    """
    require_place(source)
    if Path(source).is_file():
        return Path(source)
    try:
        return Path(cached_file(source, name, revision=revision))
    except Exception as error:
        raise ValueError(f"{source}: no file {name} there: {error}") from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pt file, on the CPU; those under `state_dict`, where there is one.

    Raises:
        ValueError: it cannot be read, or holds other objects than tensors and plain values.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file}: no weights could be read from it: {error}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file}: expected a dictionary of tensors, found {type(found).__name__}")
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{file}: {others[0]} is no tensor: this is no state dict")
    return {str(name): value for name, value in found.items()}


def frozen(network: Network, options: NeuralOptions) -> Network:
    """In evaluation mode, without gradients, in the dtype and on the device of the options."""
    try:
        return network.eval().requires_grad_(False).to(device=options.device, dtype=options.torch_dtype)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {options.device!r}: {error}") from error


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """`items` in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def clip_pixels(
    images: Sequence[NDArray[np.uint8]], size: int, *, pad: bool = False, crop: Crop = "round"
) -> Tensor:
    """Pixels as CLIP takes them, with Pillow's bicubic filter.

    Args:
        images: RGB, each (H, W, 3).
        size: side of the network's input.
        pad: the longer side becomes `size` and black is added around, as HPSv2 does; else the shorter side
            does, and the centre is cut out.
        crop: which centre, where an odd number of pixels is cut: `round` half to even, of torchvision
            (OpenAI's and open_clip's own preprocessing), or `floor`, of transformers' CLIPImageProcessor.

    Returns:
        (N, 3, size, size) float32, minus CLIP's mean, by its standard deviation.
    """
    squares = [_padded(image, size) if pad else _cropped(image, size, crop) for image in images]
    return clip_normalised(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(torch.float32) / 255)


def clip_normalised(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1, minus CLIP's mean, by its standard deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def crop_starts(lengths: Sequence[int], size: int, crop: Crop) -> list[int]:
    """Where the centre of `size` pixels starts in each of `lengths`."""
    return [(length - size) // 2 if crop == "floor" else round((length - size) / 2) for length in lengths]


def centre_of_long(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3), the middle of it where one side is more than MAX_ASPECT times the other."""
    height, width = image.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = (max(0, (length - longest) // 2) for length in (height, width))
    return image[top : top + longest, left : left + longest]


def _cropped(image: NDArray[np.uint8], size: int, crop: Crop) -> NDArray[np.uint8]:
    opened = Image.fromarray(centre_of_long(image))
    shorter = min(opened.size)
    lengths = [int(size * length / shorter) for length in opened.size]
    resized = opened.resize((lengths[0], lengths[1]), Image.Resampling.BICUBIC)
    left, top = crop_starts(lengths, size, crop)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _padded(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    opened = Image.fromarray(image)
    scale = size / max(opened.size)
    width, height = (max(1, round(length * scale)) for length in opened.size)
    square = Image.new("RGB", (size, size))
    square.paste(
        opened.resize((width, height), Image.Resampling.BICUBIC),
        ((size - width) // 2, (size - height) // 2),
    )
    return np.asarray(square)
