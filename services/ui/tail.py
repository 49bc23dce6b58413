"""metrics.jsonl of a run that may still be written: each byte is read once, whoever looks.

Promises
- `read_some` reads on from where it stopped, a bounded number of bytes; a line that is not whole yet waits
  for its rest. A file that has become shorter or another one is read from its beginning.
- What it knows is what `services.telemetry.read_metrics` gives, but for rows of updates: those are kept as
  columns, and the newest of them whole.
- Safe for one reader and many askers on several threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from services.metrics import AnyRow, EvalRow, EventRow, MemoryRow, UpdateRow, parse_row
from services.ui.columns import Columns

CHUNK = 32 * 1024
"""Read in a millisecond or so: others get a turn in between."""
MAX_LINE = 1024 * 1024
"""A longer line is no row."""
RECENT = 100
KEPT_EVENTS = 200
KEPT_LETTERS = 200
_NUMBERS = (
    "time",
    "seconds",
    "reward_mean",
    "reward_std",
    "zero_variance_groups",
    "prompts_left_out",
    "staleness_mean",
    "staleness_max",
    "queue_depth",
    "queue_bytes",
    "groups",
    "images",
    "groups_per_s",
    "loss",
    "dsm",
    "grad_norm",
    "group_weight",
    "clip_fraction",
    "kl",
    "learning_rate",
)


@dataclass(frozen=True)
class Cursor:
    """How far a client has been told; `cuts` differ where what it was told before has changed."""

    cuts: int
    end: int

    def __str__(self) -> str:
        return f"{self.cuts}.{self.end}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """None where it is no cursor.

        >>> Cursor.parse("0.4711"), Cursor.parse("mine")
        (Cursor(cuts=0, end=4711), None)
        """
        cuts, _, end = text.partition(".")
        if not (cuts.isdecimal() and end.isdecimal() and len(text) < 40):
            return None
        return cls(int(cuts), int(end))


class MetricsTail:
    """Follows one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._began_again = 0
        self._file_id: tuple[int, int] | None = None
        self.bytes_read = 0
        """In all, for tests and the bench."""
        self.size = 0
        """Of the file, when last looked at."""
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self._rest = b""
        self._columns = Columns()
        self._evals: dict[tuple[int, str], EvalRow] = {}
        self._recent: deque[UpdateRow] = deque(maxlen=RECENT)
        self._events: deque[EventRow] = deque(maxlen=KEPT_EVENTS)
        self._letters: deque[EventRow] = deque(maxlen=KEPT_LETTERS)
        self.memory: MemoryRow | None = None
        self.events_seen = 0
        self.letters_seen = 0
        self.unreadable = 0
        self.told = 0
        """Grows with every evaluation, event and memory row."""

    def read_some(self, most: int = CHUNK) -> bool:
        """Read on; True where there may be more to read at once."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_size < self._offset or self._file_id not in (None, (found.st_dev, found.st_ino)):
                    with self._lock:
                        self._began_again += 1 + self._columns.cuts
                        self._begin()
                self._file_id, self.size = (found.st_dev, found.st_ino), found.st_size
                file.seek(self._offset)
                chunk = file.read(most)
        except FileNotFoundError:
            return False
        self.bytes_read += len(chunk)
        offset = self._offset + len(chunk)
        *lines, rest = (self._rest + chunk).split(b"\n")
        end = offset - len(rest) - sum(len(line) + 1 for line in lines)
        rows: list[tuple[int, AnyRow]] = []
        unreadable = 0
        for line in lines:
            end += len(line) + 1
            if not line.strip():
                continue
            try:
                rows.append((end, parse_row(line)))
            except ValidationError:
                unreadable += 1
        if len(rest) > MAX_LINE:
            rest = b"not a row"
        # A cursor is never ahead of the rows that it stands behind.
        with self._lock:
            self._offset, self._rest = offset, rest
            self.unreadable += unreadable
            for end, row in rows:
                self._take(end, row)
        return len(chunk) == most

    def _take(self, end: int, row: AnyRow) -> None:
        if isinstance(row, UpdateRow):
            self._columns.add(row.epoch, row.step, end, numbers_of(row))
            if not self._columns.undone(row.epoch, row.step):
                self._recent.append(row)
            return
        self.told += 1
        if isinstance(row, EvalRow):
            known = self._evals.get((row.step, row.when))
            if known is None or known.epoch <= row.epoch:
                self._evals[row.step, row.when] = row
        elif isinstance(row, EventRow):
            self.events_seen += 1
            self._events.append(row)
            if row.what == "dead letter":
                self.letters_seen += 1
                self._letters.append(row)
        else:
            self.memory = row

    @property
    def cursor(self) -> Cursor:
        with self._lock:
            return self._cursor()

    def _cursor(self) -> Cursor:
        return Cursor(self._began_again + self._columns.cuts, self._offset - len(self._rest))

    @contextmanager
    def columns(self) -> Iterator[Columns]:
        """To be asked within `with`: nothing is taken in meanwhile."""
        with self._lock:
            yield self._columns

    def rows_after(self, cursor: Cursor, most: int) -> tuple[Cursor, dict[str, list[float | None]] | None]:
        """What has been appended since, and the cursor behind it; None: too much, or not only appended."""
        with self._lock:
            now = self._cursor()
            if cursor.cuts != now.cuts or cursor.end > now.end:
                return now, None
            return now, self._columns.rows_after(cursor.end, most)

    def evals(self) -> list[EvalRow]:
        """The surviving ones, in the order of steps."""
        with self._lock:
            kept = [row for row in self._evals.values() if not self._columns.undone(row.epoch, row.step)]
        return sorted(kept, key=lambda row: (row.step, row.when == "after"))

    def recent(self) -> list[UpdateRow]:
        """The newest updates, whole."""
        with self._lock:
            return [row for row in self._recent if not self._columns.undone(row.epoch, row.step)]

    def events(self) -> list[EventRow]:
        """The newest ones, oldest first."""
        with self._lock:
            return list(self._events)

    def letters(self) -> list[EventRow]:
        """The newest events that tell of an ordinal given up."""
        with self._lock:
            return list(self._letters)


def numbers_of(row: UpdateRow) -> dict[str, float]:
    """The numbers of an update by the name of their column: `loss`, `rewards.ocr.mean`."""
    found = [(name, getattr(row, name)) for name in _NUMBERS]
    for name, spread in row.rewards.items():
        found += [(f"rewards.{name}.mean", spread.mean), (f"rewards.{name}.std", spread.std)]
    return {name: value for name, value in found if value is not None and math.isfinite(value)}
