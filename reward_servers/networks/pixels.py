"""How images become the pixels that CLIP and its kin take.

Promises
- Pixels take memory by the size of the network's input, whatever the shape of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT: Final = 16
"""Of longer images only the middle is resized: a line of pixels must not become gigabytes."""

Crop = Literal["round", "floor"]


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
