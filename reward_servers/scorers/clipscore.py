"""CLIPScore: how well an image fits its prompt, by OpenAI's CLIP L/14.

    score = exp(logit_scale) * cosine(image, prompt) / 30     (CLIP's logit by 30)

Prompts are cut at 77 tokens. The published reward resizes float tensors: shorter side to 224 with an
antialiased _bilinear_ filter and no rounding to 8 bits, then centre crop; so does this. CLIP's own
preprocessing is bicubic on 8-bit images (`resize: bicubic`): scores of the two are not comparable.

Source: Hessel et al., arXiv 2104.08718, for the idea (its 2.5 * max(cosine, 0) is another scale); Flow-GRPO's
`clip_scorer.py` for this formula, with the antialiasing that torchvision >= 0.17 does by default;
`openai/clip-vit-large-patch14`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from reward_servers.networks.clip import Clip, ClipOptions, ClipPairScorer, ClipTokens
from reward_servers.networks.loading import neural_options
from reward_servers.networks.pixels import centre_of_long, clip_normalised, clip_pixels, crop_starts
from reward_servers.wire import Images


class ClipScoreOptions(ClipOptions):
    """Arguments of the `clipscore` scorer."""

    path: str = "openai/clip-vit-large-patch14"
    """Local directory or hub id of the network, in the format of transformers' CLIPModel."""
    tokenizer: str | None = None
    """Local directory or hub id of the tokenizer; null: where the network is."""
    scale: float = Field(default=30.0, gt=0)
    """The score is divided by this."""
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    """`bilinear` as the published reward, `bicubic` as CLIP was trained."""


def create(args: dict[str, Any], threads: int) -> ClipScoreScorer:
    return ClipScoreScorer(neural_options(ClipScoreOptions, args, threads))


class ClipScoreScorer(ClipPairScorer):
    name = "clipscore"
    version = "1"

    def __init__(self, options: ClipScoreOptions) -> None:
        clip = Clip.load(options.path, options)
        if options.tokenizer is None:
            tokens = ClipTokens(options.path, clip.text_config, options.revision)
        else:
            tokens = ClipTokens(options.tokenizer, clip.text_config)
        super().__init__(clip, tokens, options, factor=clip.temperature / options.scale)
        self._resize = options.resize

    def pixels(self, images: Images, side: int) -> Tensor:
        return bilinear_pixels(images, side) if self._resize == "bilinear" else clip_pixels(images, side)


def bilinear_pixels(images: Images, side: int) -> Tensor:
    """As torchvision resizes float tensors by default and crops the centre.

    Args:
        images: RGB, each (H, W, 3).

    Returns:
        (N, 3, side, side) float32, minus CLIP's mean, by its standard deviation.
    """
    return clip_normalised(torch.stack([_resized(centre_of_long(image), side) for image in images]))


def _resized(image: NDArray[np.uint8], side: int) -> Tensor:
    """(3, side, side) in 0..1. Only what the crop leaves is computed, so its memory is bounded."""
    sizes = image.shape[:2]
    lengths = [int(side * size / min(sizes)) for size in sizes]
    starts = crop_starts(lengths, side, "round")
    rows, columns = (
        _filter(size, length, start, side) for size, length, start in zip(sizes, lengths, starts, strict=True)
    )
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(torch.float32) / 255
    return rows @ pixels @ columns.T


def _filter(size: int, length: int, start: int, count: int) -> Tensor:
    """(count, size) weights of the outputs from `start` on, when `size` pixels are resized to `length`.

    A triangle that is as wide as the output pixel, at least two input pixels.
    """
    scale = size / length
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * scale
    distances = torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]
    weights = (1 - distances.abs() / max(scale, 1.0)).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(torch.float32)
