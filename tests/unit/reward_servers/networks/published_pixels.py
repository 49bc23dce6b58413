"""Preprocessing of the published CLIP rewards, written out step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from reward_servers.networks.pixels import CLIP_MEAN, CLIP_STD


def processed(images: Sequence[NDArray[np.uint8]], side: int) -> Tensor:
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    found: Tensor = processor(
        images=[Image.fromarray(one) for one in images], return_tensors="pt"
    ).pixel_values
    return found


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def torchvision_resized(images: Sequence[NDArray[np.uint8]], side: int) -> Tensor:
    """What T.Resize(bilinear, antialias) and T.CenterCrop do to float tensors."""
    squares = []
    for image in images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
        height, width = (int(side * length / min(image.shape[:2])) for length in image.shape[:2])
        pixels = nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        top, left = int(round((height - side) / 2.0)), int(round((width - side) / 2.0))  # noqa: RUF046
        squares.append(pixels[0, :, top : top + side, left : left + side])
    return normalised(torch.stack(squares))


def hps_square(image: NDArray[np.uint8], side: int) -> Tensor:
    """ResizeMaxSize of HPSv2's open_clip."""
    scale = side / float(max(image.shape[:2]))
    height, width = (round(length * scale) for length in image.shape[:2])
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    above, left = (side - height) // 2, (side - width) // 2
    square = np.pad(resized, ((above, side - height - above), (left, side - width - left), (0, 0)))
    return normalised(torch.from_numpy(square).permute(2, 0, 1) / 255)
