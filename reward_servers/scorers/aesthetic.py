"""LAION's aesthetic predictor: how much people like an image, whatever the prompt; a linear head on CLIP.

    score = head(image feature of length 1)                   (SD3.5-M: 5.4)

The head, `sac+logos+ava1-l14-linearMSE`, is five linear layers without activations (dropout between them is
for training only): one affine map, and composed into one in float64 when it is loaded. Preprocessing is that
of transformers' CLIPImageProcessor: shorter side to 224 with Pillow's bicubic filter, centre crop.

Source: github.com/christophschuhmann/improved-aesthetic-predictor, as DDPO (arXiv 2305.13301) and Flow-GRPO
use it, on `openai/clip-vit-large-patch14`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from reward_servers.networks.clip import Clip, ClipOptions
from reward_servers.networks.loading import (
    NeuralScorer,
    neural_options,
    read_weights,
    weight_file,
    weights_name,
)
from reward_servers.networks.pixels import clip_pixels
from reward_servers.scorer import ItemScore
from reward_servers.wire import Images, ScoreCall

LAYERS: Final = (0, 2, 4, 6, 7)
"""Places of the linear layers in the head; those between are dropout."""


class AestheticOptions(ClipOptions):
    """Arguments of the `aesthetic` scorer."""

    path: str = "openai/clip-vit-large-patch14"
    """Local directory or hub id of the network, in the format of transformers' CLIPModel."""
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    """Local directory or hub id that holds `head_file`, or the file itself, .pth or .safetensors. The default
    is a copy of `sac+logos+ava1-l14-linearMSE.pth`."""
    head_file: str = "aesthetic-model.pth"
    """Name of the head's weights in `head`."""


def create(args: dict[str, Any], threads: int) -> AestheticScorer:
    return AestheticScorer(neural_options(AestheticOptions, args, threads))


class AestheticScorer(NeuralScorer):
    name = "aesthetic"
    version = "1"

    def __init__(self, options: AestheticOptions) -> None:
        file = weight_file(options.head, options.head_file)
        super().__init__(options, f"{file.name} on {weights_name(options.path, options.revision)}")
        self._clip = Clip.load(options.path, options)
        self._weight, self._bias = affine_head(read_weights(file), self._clip.width, str(file))
        self._scale = options.scale

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        features = self._clip.image_features(call.images, _pixels)
        scores: list[float] = ((features @ self._weight + self._bias) / self._scale).tolist()
        return [self.item(score) for score in scores]

    def warm_up(self) -> None:
        self._clip.image_features(
            [np.zeros((self._clip.side, self._clip.side, 3), np.uint8)] * self.max_batch, _pixels
        )


def affine_head(weights: Mapping[str, Tensor], width: int, source: str) -> tuple[Tensor, Tensor]:
    """The linear layers of a head as one.

    Args:
        weights: `layers.{0,2,4,6,7}.{weight,bias}`.
        width: length of a feature.
        source: where the weights are from, for the error.

    Returns:
        (width,) and () float32: the score is `feature @ weight + bias`.

    Raises:
        ValueError: they are not those layers, or do not fit `width`.
    """
    expected = {f"layers.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
    if set(weights) != expected:
        raise ValueError(f"{source}: expected the weights {sorted(expected)}, found {sorted(weights)[:12]}")
    weight = torch.eye(width, dtype=torch.float64)
    bias = torch.zeros(width, dtype=torch.float64)
    for layer in LAYERS:
        matrix, offset = (weights[f"layers.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        if matrix.ndim != 2 or matrix.shape[1] != len(bias) or offset.shape != matrix.shape[:1]:
            raise ValueError(
                f"{source}: layer {layer} is {tuple(matrix.shape)}, but takes {len(bias)} numbers: "
                f"this head is for another network"
            )
        weight, bias = matrix @ weight, matrix @ bias + offset
    if len(bias) != 1:
        raise ValueError(f"{source}: the last layer gives {len(bias)} numbers, not one score")
    return weight[0].float(), bias[0].float()


def _pixels(images: Images, side: int) -> Tensor:
    return clip_pixels(images, side, crop="floor")
