"""What scorers that are torch networks share: where weights come from, and how images become pixels.

Promises
- Weights come from a local directory or a hub id, at a revision if one is given; no code that lies beside
  them is run, and nothing is unpickled.
- A checkpoint that lacks a weight of the network, or has another shape, is refused: a scorer never answers
  with random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from reward_servers.scorer import ScorerOptions

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

Network = TypeVar("Network", bound=nn.Module)
Item = TypeVar("Item")


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


def clip_pixels(images: Sequence[NDArray[np.uint8]], size: int, *, pad: bool = False) -> Tensor:
    """Pixels as CLIP takes them, with Pillow's bicubic filter.

    Args:
        images: RGB, each (H, W, 3).
        size: side of the network's input.
        pad: the longer side becomes `size` and black is added around; else the shorter side does, and the
            centre is cut out.

    Returns:
        (N, 3, size, size) float32, minus CLIP's mean, by its standard deviation.
    """
    squares = [_square(Image.fromarray(image), size, pad=pad) for image in images]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _square(image: Image.Image, size: int, *, pad: bool) -> NDArray[np.uint8]:
    side = max(image.size) if pad else min(image.size)
    width, height = (max(1, int(size * length / side)) for length in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size))
    # Rounded as torchvision rounds when it crops the centre.
    square.paste(resized, (round((size - width) / 2), round((size - height) / 2)))
    return np.asarray(square)
