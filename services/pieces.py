"""Things in a row, cut into pieces of a bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Thing = TypeVar("Thing")


def in_pieces(things: Iterable[Thing], size: Callable[[Thing], int], most: int) -> Iterator[list[Thing]]:
    """Neighbours together, up to `most` of their sizes; what is larger than that is a piece of its own.

    >>> list(in_pieces("a bb ccc dddddd e".split(), len, 4))
    [['a', 'bb'], ['ccc'], ['dddddd'], ['e']]
    """
    piece: list[Thing] = []
    held = 0
    for thing in things:
        more = size(thing)
        if piece and held + more > most:
            yield piece
            piece, held = [], 0
        piece.append(thing)
        held += more
    if piece:
        yield piece
