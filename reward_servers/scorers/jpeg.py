"""JPEG size as a reward: how badly, or how well, an image compresses. A reward that needs no model.

    incompressibility = bytes of the JPEG file / 1000
    compressibility   = -incompressibility / 500

Quality 95, 4:2:0 chroma, as Pillow writes it without further settings. The prompt is not looked at. Scores of
different image sizes are not comparable, and another libjpeg may differ by a few bytes.

Promises
- Batch-invariant: files are written one by one.

Source: DDPO (arXiv 2305.13301) for the idea; Flow-GRPO (arXiv 2505.05470), `flow_grpo/rewards.py`, for the
quality and the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from pydantic import Field

from reward_servers.scorer import ItemScore, Scorer, ScorerOptions
from reward_servers.wire import ScoreCall


class JpegOptions(ScorerOptions):
    """Arguments of the `jpeg` scorer."""

    rule: Literal["incompressibility", "compressibility"] = "incompressibility"
    """Whether large files are good (kilobytes, 20 to 200 at 512 x 512) or small ones (from -0.4 up to 0)."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of the JPEG encoder; published scores have 95."""


def create(args: dict[str, Any], threads: int) -> JpegScorer:
    return JpegScorer(JpegOptions.model_validate(args))


class JpegScorer(Scorer):
    name = "jpeg"
    version = "1"
    batch_invariant = True
    max_batch = 64

    def __init__(self, options: JpegOptions) -> None:
        self.options = options
        self._rule = options.rule
        self._quality = options.quality
        encoder = features.version("libjpeg_turbo") or features.version("jpg")
        self.model = f"libjpeg {encoder} (Pillow {version('pillow')})"

    def score(self, call: ScoreCall) -> Sequence[ItemScore]:
        return [self._item(image) for image in call.images]

    def warm_up(self) -> None:
        self._item(np.zeros((16, 16, 3), np.uint8))

    def _item(self, image: NDArray[np.uint8]) -> ItemScore:
        file = BytesIO()
        try:
            Image.fromarray(image).save(file, "JPEG", quality=self._quality)
        except OSError as error:  # a side over 65500 pixels
            return ItemScore(
                None, error=f"no JPEG file of {image.shape[1]} x {image.shape[0]} pixels: {error}"
            )
        incompressibility = file.tell() / 1000
        score = incompressibility if self._rule == "incompressibility" else -incompressibility / 500
        return ItemScore(score, {"bytes": file.tell()})
