"""What a run leaves behind while it runs: metrics.jsonl and TensorBoard events (logs: services/logs.py).

Promises
- A row is on its way to disk when `write` returns: appended whole and flushed, never rewritten. Where the
  disk refuses it, the error names the file, and ends the run.
- A line torn by a crash costs that line and no other: the next writer starts a line of its own, and the
  reader skips what it cannot parse.
- `read_metrics` gives one lineage: where a resume went back, the rows it undid are left out.

Imports neither Redis nor Ray, and TensorBoard only when events are asked for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal, Protocol

from pydantic import ValidationError

from services.full_disk import naming
from services.metrics import AnyRow, EvalRow, EventRow, MemoryRow, UpdateRow, parse_row

if TYPE_CHECKING:
    from services.tensorboard_events import TensorboardEvents

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class RowSink(Protocol):
    """Somewhere else that rows go."""

    def add(self, row: AnyRow) -> None: ...


class Telemetry:
    """Appends rows to the run directory. One writer a run directory: the driver.

    >>> with Telemetry(Path("runs/demo"), tensorboard=False) as telemetry:  # doctest: +SKIP
    ...     telemetry.write(EventRow(time=time.time(), what="resumed"))
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool = True,
        beside: Sequence[RowSink] = (),
    ) -> None:
        """Open for appending.

        Args:
            run_dir: made if it is not there.
            tensorboard: also write scalars into `tensorboard/`.
            beside: told every row too, once it is written.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        torn = _ends_inside_a_line(self._path)
        self._file: IO[str] = self._path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
        self._beside = tuple(beside)
        self._events: TensorboardEvents | None = None
        if tensorboard:
            from services.tensorboard_events import TensorboardEvents

            self._events = TensorboardEvents(run_dir / "tensorboard")

    def write(self, row: AnyRow) -> None:
        with naming(self._path):
            self._file.write(row.model_dump_json() + "\n")
            self._file.flush()
        if self._events is not None:
            self._events.add(row)
        for sink in self._beside:
            sink.add(row)

    def event(
        self,
        what: str,
        detail: str = "",
        *,
        level: Literal["info", "warning", "error"] = "info",
        step: int | None = None,
        ordinal: int | None = None,
    ) -> EventRow:
        """Write something that happened once, now."""
        row = EventRow(time=time.time(), level=level, what=what, detail=detail, step=step, ordinal=ordinal)
        self.write(row)
        return row

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            with naming(self._path), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            if self._events is not None:
                self._events.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Metrics:
    """The rows of a run directory, the surviving lineage only, each list in the order of its steps."""

    updates: tuple[UpdateRow, ...] = ()
    evals: tuple[EvalRow, ...] = ()
    events: tuple[EventRow, ...] = ()
    memory: MemoryRow | None = None
    unreadable: int = 0
    """Lines that were not rows: one, torn, is normal after a crash."""

    @property
    def last_update(self) -> UpdateRow | None:
        return self.updates[-1] if self.updates else None

    def evaluation(self, when: str) -> EvalRow | None:
        """The newest evaluation made `before`, `during` or `after` training.

        One after training is none any more once the run has gone on from there.
        """
        found = [row for row in self.evals if row.when == when]
        if when == "after" and found and self.updates and found[-1].step < self.updates[-1].step:
            return None
        return found[-1] if found else None

    @property
    def newest_evaluation(self) -> EvalRow | None:
        """Of trained weights."""
        return max((row for row in reversed(self.evals) if row.step), key=lambda row: row.step, default=None)


def read_metrics(run_dir: Path) -> Metrics:
    """Read metrics.jsonl; an absent file is a run that has not written anything yet."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return Metrics()
    rows: list[AnyRow] = []
    unreadable = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                rows.append(parse_row(line))
            except ValidationError:
                unreadable += 1
    if unreadable:
        _warn_of_unreadable(path, unreadable)
    updates = [row for row in rows if isinstance(row, UpdateRow)]
    evals = [row for row in rows if isinstance(row, EvalRow)]
    first = _first_step_by_epoch(updates)
    kept_updates = {row.step: row for row in updates if not _undone(row, first)}
    kept_evals = {
        (row.step, row.when): row
        for row in sorted(evals, key=lambda row: row.epoch)
        if not _undone(row, first)
    }
    memory = [row for row in rows if isinstance(row, MemoryRow)]
    return Metrics(
        updates=tuple(sorted(kept_updates.values(), key=lambda row: row.step)),
        evals=tuple(sorted(kept_evals.values(), key=lambda row: (row.step, row.when == "after"))),
        events=tuple(row for row in rows if isinstance(row, EventRow)),
        memory=memory[-1] if memory else None,
        unreadable=unreadable,
    )


def _ends_inside_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


@cache
def _warn_of_unreadable(path: Path, lines: int) -> None:
    """Once, however often the file is read."""
    log.warning("%s: skipped %d lines that are not rows", path, lines)


def _first_step_by_epoch(updates: list[UpdateRow]) -> dict[int, int]:
    first: dict[int, int] = {}
    for row in updates:
        first[row.epoch] = min(row.step, first.get(row.epoch, row.step))
    return first


def _undone(row: UpdateRow | EvalRow, first_step: dict[int, int]) -> bool:
    """A later epoch trained this step again, so the row belongs to a lineage that did not survive."""
    return any(epoch > row.epoch and step <= row.step for epoch, step in first_step.items())
