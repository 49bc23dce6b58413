"""The numbers of a run's updates as columns, in the order of their steps: what curves are drawn from.

Promises
- The same lineage as `services.telemetry.read_metrics`, row by row: what a resume undid is gone.
- A row that is appended changes no other; whatever else happens counts as a cut, and grows `cuts`.
- A curve of any length is thinned to a bounded number of points, and keeps its highest and lowest ones.

Not for several threads: its owner holds a lock (tail.py).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

MOST_COLUMNS = 512
"""Beyond these new names are left out: a run has about 40."""


class Columns:
    """Numbers by name and step; NaN where a step has none."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._epochs = array("q")
        self._ends = array("q")
        self._named: dict[str, array[float]] = {}
        self._first: dict[int, int] = {}
        self.cuts = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._named)

    @property
    def last_step(self) -> int:
        """0 before the first update."""
        return self._steps[-1] if self._steps else 0

    def undone(self, epoch: int, step: int) -> bool:
        """A later epoch trained this step again."""
        return any(later > epoch and first <= step for later, first in self._first.items())

    def add(self, epoch: int, step: int, end: int, values: Mapping[str, float]) -> None:
        """Take one update in.

        Args:
            end: where its line ends in the file, bytes.
        """
        if step < self._first.get(epoch, step + 1):
            self._first[epoch] = step
            self._drop_before(epoch, step)
        if self.undone(epoch, step):
            return
        place = len(self._steps)
        if place and self._steps[-1] >= step:
            self.cuts += 1
            place = bisect_left(self._steps, step)
            if self._steps[place] == step:
                self._delete(place)
        self._steps.insert(place, step)
        self._epochs.insert(place, epoch)
        self._ends.insert(place, end)
        for name in values:
            if name not in self._named and len(self._named) < MOST_COLUMNS:
                self._named[name] = array("d", [np.nan]) * (len(self._steps) - 1)
        for name, column in self._named.items():
            column.insert(place, values.get(name, np.nan))

    def _drop_before(self, epoch: int, step: int) -> None:
        """What earlier epochs have from this step on."""
        start = bisect_left(self._steps, step)
        undone = [place for place in range(start, len(self._steps)) if self._epochs[place] < epoch]
        self.cuts += bool(undone)
        for place in reversed(undone):
            self._delete(place)

    def _delete(self, place: int) -> None:
        for counts in (self._steps, self._epochs, self._ends):
            del counts[place]
        for column in self._named.values():
            del column[place]

    def steps(self, first: int | None = None, last: int | None = None) -> Values:
        """Those between these steps, both included."""
        start, stop = self._range(first, last)
        return np.frombuffer(self._steps, dtype=np.int64)[start:stop].astype(np.float64)

    def column(self, name: str, first: int | None = None, last: int | None = None) -> Values:
        """Empty where nothing of that name was ever told."""
        start, stop = self._range(first, last)
        # A copy: while somebody holds a view of it, an array cannot grow.
        return np.frombuffer(self._named.get(name, array("d")), dtype=np.float64)[start:stop].copy()

    def _range(self, first: int | None, last: int | None) -> tuple[int, int]:
        start = 0 if first is None else bisect_left(self._steps, first)
        stop = len(self._steps) if last is None else bisect_right(self._steps, last)
        return start, max(start, stop)

    def rows_after(self, end: int, most: int) -> dict[str, list[float | None]] | None:
        """The appended rows whose lines end behind `end`, by column; None where they are more than `most`."""
        start = len(self._ends)
        while start > 0 and self._ends[start - 1] > end:
            start -= 1
            if len(self._ends) - start > most:
                return None
        told: dict[str, list[float | None]] = {"step": list(self._steps[start:])}
        for name, column in self._named.items():
            told[name] = [None if value != value else value for value in column[start:]]
        return told

    def resumes(self) -> list[int]:
        """The steps after which a later epoch goes on."""
        epochs = np.array(self._epochs, dtype=np.int64)
        return [int(self._steps[place]) for place in np.flatnonzero(np.diff(epochs) > 0)]


def thinned(y: Values, most: int) -> NDArray[np.int64]:
    """Places of at most `most` points that draw the same curve: of equal shares the lowest and the highest.

    Args:
        y: NaN where nothing was measured: nothing is drawn there.
        most: from 4 on.

    >>> thinned(np.array([0, 0, 9, 0, 0, 0, -9, 0, 0.0]), 6).tolist()
    [0, 2, 5, 6, 8]
    """
    measured = np.isfinite(y)
    known = None if measured.all() else np.flatnonzero(measured)
    values = y if known is None else y[known]
    if len(values) <= most:
        return np.arange(len(values)) if known is None else known
    size = -(-len(values) // (most // 2 - 1))
    padded = np.append(values, np.full(-len(values) % size, values[-1])).reshape(-1, size)
    starts = np.arange(len(padded)) * size
    lowest, highest = padded.argmin(axis=1) + starts, padded.argmax(axis=1) + starts
    ends = np.array([0, len(values) - 1])
    chosen = np.sort(np.concatenate([ends, lowest, highest]).clip(max=len(values) - 1))
    places: NDArray[np.int64] = chosen[np.append(np.diff(chosen) > 0, True)]
    return places if known is None else known[places]
