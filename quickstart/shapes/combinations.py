"""What the shapes task holds out: combinations of things, each of which is trained.

Promises
- A combination brings two things together: a shape and its colour, a shape and its number, two shapes in one
  image, or a shape and being asked for alone by nothing but its name. Which are held out follows from the
  order of `SHAPES` and `COLOURS` alone: the same on every machine, for every seed.
- Every shape, colour and number is still trained in most of its combinations: 2 of 8 colours of each shape
  are held out, 2 of its 7 companions, 1 of its 3 numbers, and 2 of the 8 shapes are never asked for alone.

The exclusive or of two indices below 8 is a Latin square: each value pairs every row with another column.
"""

from __future__ import annotations

from typing import Final

from reward_servers.shapes.outlines import COLOURS, SHAPES

NUMBERS: Final = (2, 3, 4)
"""How many of one shape may be asked for, beside one."""

_COLOUR_OFFSETS: Final = (3, 5)
_COMPANION_OFFSETS: Final = (1, 6)
_NEVER_ALONE: Final = (2, 5)


def colour_is_heldout(shape: str, colour: str) -> bool:
    """Whether no training image or caption shows `shape` in `colour`.

    >>> [colour for colour in COLOURS if colour_is_heldout("circle", colour)]
    ['green', 'purple']
    """
    return SHAPES.index(shape) ^ COLOURS.index(colour) in _COLOUR_OFFSETS


def companion_is_heldout(shape: str, other: str) -> bool:
    """Whether no training image or caption has both shapes.

    >>> [shape for shape in SHAPES if companion_is_heldout("circle", shape)]
    ['square', 'ring']
    """
    return SHAPES.index(shape) ^ SHAPES.index(other) in _COMPANION_OFFSETS


def number_is_heldout(shape: str, number: int) -> bool:
    """Whether no training image or caption has that many of `shape`.

    >>> [number for number in NUMBERS if number_is_heldout("circle", number)]
    [2]
    """
    return number in NUMBERS and NUMBERS.index(number) == SHAPES.index(shape) % len(NUMBERS)


def alone_is_heldout(shape: str) -> bool:
    """Whether no training caption asks for one `shape` and nothing more.

    >>> [shape for shape in SHAPES if alone_is_heldout(shape)]
    ['triangle', 'star']
    """
    return SHAPES.index(shape) in _NEVER_ALONE
