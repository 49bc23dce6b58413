"""Contact sheets: the images of a shard with what was asked for and how they scored.

Promises
- A caption shows every character of a prompt or an escape for it: control characters, line breaks and marks
  that turn the direction of writing cannot break or hide what is beside them.
- Images larger than a cell are reduced; of tiny ones every pixel is shown as a square.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from services.suites.folder import Sample

CELL = 224
"""Width of a cell, pixels; images get as much of it as they need."""
TINY = 128
"""Images are enlarged by the largest whole factor that keeps both sides within this many pixels."""
COLUMNS = 4
LINES = 4
"""Of a caption: three for the prompt, one for the scores."""
FONT_SIZE = 11
LINE_HEIGHT = 14
MARGIN = 4


def write_sheet(
    images: NDArray[np.uint8], samples: Sequence[Sample], path: Path, *, samples_a_prompt: int
) -> None:
    """Write a PNG: one row of cells a prompt where it has several samples, else prompts side by side.

    Args:
        images: (N, H, W, 3).
        samples: N, what the images are.
    """
    columns = min(COLUMNS, len(images)) if samples_a_prompt == 1 else samples_a_prompt
    height, width = images.shape[1:3]
    scale = min(max(1, TINY // max(height, width)), (CELL - 2 * MARGIN) / width)
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    cell = CELL, shown[1] + 3 * MARGIN + LINES * LINE_HEIGHT
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, sample) in enumerate(zip(images, samples, strict=True)):
        left, top = number % columns * cell[0], number // columns * cell[1]
        picture = Image.fromarray(image)
        if picture.size != shown:
            picture = picture.resize(
                shown, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
            )
        sheet.paste(picture, (left + (cell[0] - shown[0]) // 2, top + MARGIN))
        for line, text in enumerate(caption(sample)):
            place = left + MARGIN, top + shown[1] + 2 * MARGIN + line * LINE_HEIGHT
            draw.text(place, text, fill="black", font=_font())
    partial = path.with_name(f".{path.name}.partial")
    sheet.save(partial, format="PNG")
    partial.replace(path)


def caption(sample: Sample) -> list[str]:
    """The lines below an image: the prompt, escaped and cut to fit, and the scores."""
    told = f"{sample.place}.{sample.sample} {escaped(sample.prompt)}"
    lines = _wrapped(told, LINES - 1)
    scores = "  ".join(f"{name} {value:.3f}" for name, value in sample.scores.items())
    return [*lines, _cut(scores)]


def escaped(text: str) -> str:
    r"""A text in which every character is visible, or told by its number.

    >>> escaped("a\nb\u202ec")
    'a\\nb\\u202ec'
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character)[0] == "C" or unicodedata.category(character) in ("Zl", "Zp")
        else character
        for character in text
    )


def _wrapped(text: str, lines: int) -> list[str]:
    """Broken where it is full, not at words: nothing may be wider than a cell."""
    found: list[str] = []
    while text and len(found) < lines - 1:
        part = _fitting(text)
        found.append(text[:part])
        text = text[part:].lstrip(" ")
    return [*found, _cut(text)] if text else found


def _cut(text: str) -> str:
    if _fitting(text) >= len(text):
        return text
    while text and _width(text + "…") > CELL - 2 * MARGIN:
        text = text[:-1]
    return text + "…"


def _fitting(text: str) -> int:
    """How many characters, at least one, are no wider than a cell."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _width(text[:middle]) <= CELL - 2 * MARGIN else (low, middle - 1)
    return low


def _width(text: str) -> float:
    return float(_font().getlength(text))


@cache
def _font() -> ImageFont.FreeTypeFont:
    # DejaVu comes with matplotlib, so no font file has to be shipped or found on the machine.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), FONT_SIZE)
