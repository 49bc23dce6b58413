"""Ground truth: coloured shapes drawn on a 32 x 32 RGB image, as a request asks for and nothing beside it.

Promises
- An image depends on the request and the given random state alone.
- It satisfies its request by the strict rule, and shows no other object. What the request leaves open (size,
  place, background, untold colours and shade) varies.
- An image of a request without held-out combinations shows none either: untold colours are trained ones.
- Objects keep `MARGIN` pixels from the edge and `GAP` from each other.
"""

from __future__ import annotations

import colorsys
import math
import random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quickstart.shapes.combinations import colour_is_heldout
from quickstart.shapes.requests import Request
from reward_servers.shape_drawing import coverage
from reward_servers.shape_outlines import COLOURS, PALETTE

HEIGHT: Final = 32
WIDTH: Final = 32
MARGIN: Final = 1.0
GAP: Final = 2.0
SIZES: Final = {1: (10.0, 15.0), 2: (8.8, 12.0), 3: (8.4, 8.9), 4: (8.4, 8.9)}
"""Least and largest size of an object, in pixels, by how many there are."""
LATTICE: Final = 4
"""Centres are whole multiples of so many pixels, those of one latent: the autoencoder then gives a shape the
same latents wherever it stands, and a model of this size can learn them."""
TRIES: Final = 8
"""Draws of a place, for each object, before all are placed anew."""
SHADE: Final = 12.0
"""How far each channel of a colour may be from the palette's."""
STEEPNESS: Final = 1.5
"""In a relation, how many times as far apart the centres are along it as across it."""

Place = tuple[float, float, float]
"""Centre x and y, and size."""


def render(request: Request, rng: random.Random) -> NDArray[np.uint8]:
    """Draw a request.

    Returns:
        (HEIGHT, WIDTH, 3) RGB image.
    """
    shapes = request.shapes * request.number
    colours = request.colours or tuple(_untold_colour(shape, rng) for shape in request.shapes)
    image = np.empty((HEIGHT, WIDTH, 3), np.float32)
    image[:] = _background(rng)
    for shape, colour, (x, y, size) in zip(
        shapes, colours * request.number, _places(len(shapes), request.relation, rng), strict=True
    ):
        share = coverage(shape, (x, y), size, (HEIGHT, WIDTH))[..., None]
        image += share * (_shade(colour, rng) - image)
    return np.round(image).clip(0, 255).astype(np.uint8)


def _places(count: int, relation: str | None, rng: random.Random) -> list[Place]:
    """Where objects of what size go; drawn again from the beginning where one does not fit."""
    while True:
        places: list[Place] = []
        for _ in range(count * TRIES):
            size = rng.uniform(*SIZES[count])
            place = (_centre(WIDTH, size, rng), _centre(HEIGHT, size, rng), size)
            if not any(_too_close(place, other) for other in places):
                places.append(place)
            if len(places) == count:
                break
        if len(places) == count and (relation is None or _stands(places[0], places[1], relation)):
            return places


def _centre(side: int, size: float, rng: random.Random) -> float:
    """On the lattice, as far from both ends as an object of that size must be."""
    first = math.ceil((_radius(size) + MARGIN) / LATTICE)
    return float(LATTICE * rng.randint(first, side // LATTICE - first))


def _radius(size: float) -> float:
    """Of a circle around any shape of that size, but for the corners of the widest ones."""
    return 0.56 * size


def _too_close(one: Place, other: Place) -> bool:
    """Whether their squares come closer than `GAP` along both axes."""
    reach = _radius(one[2]) + _radius(other[2]) + GAP
    return abs(one[0] - other[0]) < reach and abs(one[1] - other[1]) < reach


def _stands(one: Place, other: Place, relation: str) -> bool:
    dx, dy = one[0] - other[0], one[1] - other[1]
    along, across = {
        "left of": (-dx, dy),
        "right of": (dx, dy),
        "above": (-dy, dx),
        "below": (dy, dx),
    }[relation]
    return along >= STEEPNESS * abs(across)


def _untold_colour(shape: str, rng: random.Random) -> str:
    return rng.choice([colour for colour in COLOURS if not colour_is_heldout(shape, colour)])


def _background(rng: random.Random) -> NDArray[np.float32]:
    """A light colour, RGB 0..255."""
    return 255 * np.array(
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(0.9, 1.0)), np.float32
    )


def _shade(colour: str, rng: random.Random) -> NDArray[np.float32]:
    return np.array([channel + rng.uniform(-SHADE, SHADE) for channel in PALETTE[colour]], np.float32)
