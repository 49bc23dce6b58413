"""Draws the outlines of shapes: ground truth of the shapes task, and templates of its scorer.

Promises
- Anti-aliased by area: a pixel's value is the share of it that lies inside the outline.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from reward_servers.shapes.outlines import OUTLINES, Point

_OVERSAMPLING: Final = 8


def coverage(shape: str, centre: Point, size: float, extent: tuple[int, int]) -> NDArray[np.float32]:
    """How much of each pixel a shape covers.

    Args:
        shape: one of `SHAPES`.
        centre: x and y in pixels; (0, 0) is the corner of the first pixel, not its middle.
        size: pixels that the outline's unit is drawn as, about its width.
        extent: height and width of the result.

    Returns:
        (H, W), 0..1.
    """
    height, width = extent
    fine = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING), np.uint8)
    fraction_bits = 4
    lines = [
        np.round(((np.array(line) * size + centre) * _OVERSAMPLING - 0.5) * (1 << fraction_bits)).astype(
            np.int32
        )
        for line in OUTLINES[shape]
    ]
    cv2.fillPoly(fine, lines, 1, shift=fraction_bits)
    blocks = fine.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING)
    share: NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float32)
    return share
