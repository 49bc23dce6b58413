"""Coloured shapes: their names, colours and outlines.

Promises
- `SHAPES` and `PALETTE` are what the scorer `shapes` can tell apart; who draws ground truth takes both from
  here, so that asking for something that cannot be seen is impossible.
- Names and numbers alone: importing it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

Point = tuple[float, float]

PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 39, 40),
    "orange": (250, 145, 30),
    "yellow": (240, 220, 30),
    "green": (40, 160, 60),
    "blue": (40, 85, 215),
    "purple": (125, 45, 165),
    "pink": (245, 130, 190),
    "black": (25, 25, 25),
}
"""RGB by colour name, a subset of GenEval's names."""


def _regular(corners: int, radius: float, turn: float) -> list[Point]:
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star() -> list[Point]:
    outer, inner = _regular(5, 0.56, -math.pi / 2), _regular(5, 0.235, -math.pi / 2 + math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _cross(arm: float = 0.16) -> list[Point]:
    far = 0.5
    quarter = [(arm, -far), (arm, -arm), (far, -arm), (far, arm), (arm, arm), (arm, far)]
    return quarter + [(-x, -y) for x, y in quarter]


def _heart() -> list[Point]:
    turns = [2 * math.pi * step / 48 for step in range(48)]
    return [
        (
            16 * math.sin(turn) ** 3 / 32,
            -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)) / 32
            - 0.07,
        )
        for turn in turns
    ]


OUTLINES: Final[dict[str, Sequence[Sequence[Point]]]] = {
    "circle": [_regular(48, 0.5, 0.0)],
    "square": [_regular(4, 0.62, math.pi / 4)],
    "triangle": [[(0.0, -0.5), (0.56, 0.46), (-0.56, 0.46)]],
    "diamond": [[(0.0, -0.58), (0.42, 0.0), (0.0, 0.58), (-0.42, 0.0)]],
    "cross": [_cross()],
    "star": [_star()],
    "ring": [_regular(48, 0.53, 0.0), _regular(48, 0.27, 0.0)],
    "heart": [_heart()],
}
"""Closed lines by shape, about as wide as 1 and centred on 0, y downwards; what is inside an even number of
them is a hole."""

SHAPES: Final = tuple(OUTLINES)
COLOURS: Final = tuple(PALETTE)
