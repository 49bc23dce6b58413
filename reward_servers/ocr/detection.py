"""Lines of text in an image, by the detector of PP-OCRv6 (small), ONNX, as it lies in the rapidocr wheel.

Promises
- Lines come in reading order: rows from top to bottom, in a row from left to right.
- An image's lines do not depend, to the bit, on what else is read: the network sees one image at a time.
- Small images are not enlarged, as rapidocr's default (`limit_type=min`, 736) does: that takes seconds an
  image and finds nothing.

Preprocessing and thresholds, of rapidocr's PP-OCRv6 pipeline: BGR, bilinear to multiples of 32 pixels,
(x / 255 - 0.5) / 0.5; probability 0.3, box 0.5, boxes grown by 1.6 of area / perimeter.
"""

from __future__ import annotations

import math
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

Box = NDArray[np.float32]
"""(4, 2) corners x, y in pixels: top left, top right, bottom right, bottom left."""

_STEP: Final = 32
"""Sides of the network's input are multiples of it."""
_UPRIGHT: Final = 1.5
"""A box that is this many times as high as wide holds text that was turned by 90 degrees (PaddleOCR)."""
_WIDTH_STEP: Final = 128
_GREY: Final = (128, 128, 128)


class TextDetector:
    """Finds lines of text."""

    def __init__(self, session: Any, longest_side: int) -> None:
        """
        Args:
            session: onnxruntime session of a DB detector.
            longest_side: larger images are reduced to it, pixels.
        """
        # Here, because it brings shapely and pyclipper, which reading single lines does not need.
        from rapidocr.ch_ppocr_det.utils import DBPostProcess

        self._session = session
        self._input = session.get_inputs()[0].name
        self._longest_side = longest_side
        self._boxes = DBPostProcess(
            thresh=0.3, box_thresh=0.5, max_candidates=1000, unclip_ratio=1.6, use_dilation=True
        )

    def rows(self, image: NDArray[np.uint8]) -> list[list[Box]]:
        """The boxes of an (H, W, 3) RGB image, by row, in reading order."""
        height, width = image.shape[:2]
        scale = min(1.0, self._longest_side / max(height, width))
        size = [max(_STEP, round(side * scale / _STEP) * _STEP) for side in (width, height)]
        pixels = cv2.resize(image, size)[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)
        pixels = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        probability = self._session.run(None, {self._input: np.ascontiguousarray(pixels)})[0]
        boxes, _ = self._boxes(probability, (height, width))
        return in_rows([np.asarray(box, np.float32) for box in boxes])


def in_rows(boxes: list[Box]) -> list[list[Box]]:
    """Boxes in reading order.

    Two are in one row where their centres differ vertically by less than half the lower of their heights.

    >>> left, right, below = ([[x, y], [x + 9, y], [x + 9, y + 8], [x, y + 8]]
    ...                       for x, y in ((0, 2), (20, 0), (5, 11)))
    >>> [[box[0].tolist() for box in row]
    ...  for row in in_rows([np.array(box, np.float32) for box in (below, right, left)])]
    [[[0.0, 2.0], [20.0, 0.0]], [[5.0, 11.0]]]
    """
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: (_centre(box)[1], _centre(box)[0])):
        if rows:
            last = rows[-1][-1]
            if _centre(box)[1] - _centre(last)[1] < min(_height(box), _height(last)) / 2:
                rows[-1].append(box)
                continue
        rows.append([box])
    return [sorted(row, key=lambda box: _centre(box)[0]) for row in rows]


def cut_out(image: NDArray[np.uint8], box: Box, height: int) -> NDArray[np.uint8]:
    """The line in a box, upright, with grey added on the right.

    The grey makes the width, once the line is `height` pixels high, a multiple of 128: a recogniser that runs
    one batch a width then needs few batches. It is what PP-OCR was trained with on that side.

    Returns:
        (h, w, 3) RGB.
    """
    wide = max(1, int(max(math.dist(box[0], box[1]), math.dist(box[2], box[3]))))
    high = max(1, int(max(math.dist(box[0], box[3]), math.dist(box[1], box[2]))))
    corners = np.array([[0, 0], [wide, 0], [wide, high], [0, high]], np.float32)
    line = cv2.warpPerspective(
        image,
        cv2.getPerspectiveTransform(box, corners),
        (wide, high),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    if high >= _UPRIGHT * wide:
        line = np.rot90(line)
        high, wide = wide, high
    steps = math.ceil(wide * height / high / _WIDTH_STEP)
    added = max(0, round(steps * _WIDTH_STEP * high / height) - wide)
    padded = cv2.copyMakeBorder(np.ascontiguousarray(line), 0, 0, 0, added, cv2.BORDER_CONSTANT, value=_GREY)
    return np.asarray(padded, np.uint8)


def _centre(box: Box) -> tuple[float, float]:
    x, y = box.mean(axis=0)
    return float(x), float(y)


def _height(box: Box) -> float:
    return float(np.linalg.norm(box[0] - box[3]))
