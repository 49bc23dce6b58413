"""Small PNG files of sampled images, for reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_strip(images: NDArray[np.uint8], path: Path) -> None:
    """N images side by side in one row, no margins.

    Args:
        images: (N, H, W, 3).
        path: of the PNG.
    """
    write_grid(images, path, columns=len(images))


def write_grid(images: NDArray[np.uint8], path: Path, *, columns: int) -> None:
    """N images in rows of `columns`; the last row is filled up with white."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, dtype=np.uint8)
    sheet[:count] = images
    picture = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    Image.fromarray(picture.reshape(rows * height, columns * width, channels)).save(path)
