"""Ground truth: a word drawn on a 32 x 64 RGB image, in varying colours, sizes and places.

Promises
- An image depends on the word and the given random state alone.
- Every image can be read by the OCR engine that gives the reward: the text is darker than its background by
  at least `MIN_CONTRAST` and lies inside the image. A test reads a sample back.
"""

import colorsys
import random
from functools import cache
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

HEIGHT: Final = 32
WIDTH: Final = 64
FONT_SIZES: Final = (20, 21, 22, 23)
MIN_CONTRAST: Final = 150.0
"""Least difference of luminance between background and text, in units of 0..255."""
MARGIN: Final = 2.0
MAX_SHIFT: Final = (2.0, 2.0)
"""How far a word may lie from the centre, x and y, in pixels."""

Color = tuple[int, int, int]


def render(word: str, rng: random.Random) -> NDArray[np.uint8]:
    """Draw `word`, dark on light.

    Returns:
        (HEIGHT, WIDTH, 3) RGB image.
    """
    background, ink = _colors(rng)
    image = Image.new("RGB", (WIDTH, HEIGHT), background)
    draw = ImageDraw.Draw(image)
    font = _font(rng.choice(FONT_SIZES))
    left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
    x = _place(WIDTH, right - left, MAX_SHIFT[0], rng) - left
    y = _place(HEIGHT, bottom - top, MAX_SHIFT[1], rng) - top
    draw.text((x, y), word, font=font, fill=ink)
    return np.array(image)


def luminance(color: Color) -> float:
    """Rec. 601 luma of an RGB colour, 0..255."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _colors(rng: random.Random) -> tuple[Color, Color]:
    """A light background and a dark ink, hues independent of each other."""
    while True:
        background = _hsv(rng.random(), rng.uniform(0.05, 0.35), rng.uniform(0.88, 1.0))
        ink = _hsv(rng.random(), rng.uniform(0.3, 1.0), rng.uniform(0.05, 0.45))
        if luminance(background) - luminance(ink) >= MIN_CONTRAST:
            return background, ink


def _hsv(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _place(space: int, extent: float, max_shift: float, rng: random.Random) -> float:
    """Where a box of length `extent` begins so that it keeps the margin."""
    shift = max(0.0, min(max_shift, (space - extent) / 2 - MARGIN))
    return (space - extent) / 2 + rng.uniform(-shift, shift)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # DejaVu comes with matplotlib, so no font file has to be shipped or found on the machine.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), size)
