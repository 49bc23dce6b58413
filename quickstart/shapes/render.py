"""Ground truth: coloured shapes drawn on a 32 x 32 RGB image, as a request asks for and nothing beside it.

Promises
- An image depends on the request and the given random state alone.
- It satisfies its request by the strict rule, and shows no other object. What the request leaves open (size,
  place, background, untold colours and shade) varies.
- An image of a request without held-out combinations shows none either: untold colours are trained ones.
- Each object stands in a quarter of the image of its own, `MARGIN` pixels or more from the quarter's edge:
  two are twice as far apart.
"""

from __future__ import annotations

import colorsys
import random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quickstart.shapes.combinations import colour_is_heldout
from quickstart.shapes.requests import Request
from reward_servers.shapes.drawing import coverage
from reward_servers.shapes.outlines import COLOURS, PALETTE

HEIGHT: Final = 32
WIDTH: Final = 32
QUARTER: Final = 16
"""Side of a quarter in pixels. Places are few, so that a model of this size learns them in minutes."""
MARGIN: Final = 1.0
SIZES: Final = (9.5, 12.0)
"""Least and largest size of an object, in pixels."""
SHADE: Final = 12.0
"""How far each channel of a colour may be from the palette's."""

Quarter = tuple[int, int]
"""Column and row, 0 or 1 each."""

QUARTERS: Final[tuple[Quarter, ...]] = ((0, 0), (1, 0), (0, 1), (1, 1))


def render(request: Request, rng: random.Random) -> NDArray[np.uint8]:
    """Draw a request.

    Returns:
        (HEIGHT, WIDTH, 3) RGB image.
    """
    shapes = request.shapes * request.number
    colours = request.colours or tuple(_untold_colour(shape, rng) for shape in request.shapes)
    image = np.empty((HEIGHT, WIDTH, 3), np.float32)
    image[:] = _background(rng)
    quarters = _quarters(len(shapes), request.relation, rng)
    for shape, colour, quarter in zip(shapes, colours * request.number, quarters, strict=True):
        size = rng.uniform(*SIZES)
        share = coverage(shape, _centre(quarter, size, rng), size, (HEIGHT, WIDTH))[..., None]
        image += share * (_shade(colour, rng) - image)
    return np.round(image).clip(0, 255).astype(np.uint8)


def _quarters(count: int, relation: str | None, rng: random.Random) -> list[Quarter]:
    """Different quarters; in a relation those of two objects beside or above each other."""
    if relation is None:
        return rng.sample(QUARTERS, count)
    side = rng.randrange(2)
    if relation in ("left of", "right of"):
        near, far = (0, side), (1, side)
    else:
        near, far = (side, 0), (side, 1)
    return [near, far] if relation in ("left of", "above") else [far, near]


def _centre(quarter: Quarter, size: float, rng: random.Random) -> tuple[float, float]:
    """x and y of an object that fits into its quarter with `MARGIN` around it."""
    play = QUARTER / 2 - _radius(size) - MARGIN
    x, y = (QUARTER * (place + 0.5) + rng.uniform(-play, play) for place in quarter)
    return x, y


def _radius(size: float) -> float:
    """Of a circle around any shape of that size, but for the corners of the widest ones."""
    return 0.56 * size


def _untold_colour(shape: str, rng: random.Random) -> str:
    return rng.choice([colour for colour in COLOURS if not colour_is_heldout(shape, colour)])


def _background(rng: random.Random) -> NDArray[np.float32]:
    """A light colour, RGB 0..255."""
    return 255 * np.array(
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(0.9, 1.0)), np.float32
    )


def _shade(colour: str, rng: random.Random) -> NDArray[np.float32]:
    return np.array([channel + rng.uniform(-SHADE, SHADE) for channel in PALETTE[colour]], np.float32)
