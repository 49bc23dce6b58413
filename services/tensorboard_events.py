"""TensorBoard event files from metrics rows, written without importing torch.

Promises
- One scalar a number, named section/name; null values are left out.
- Where a run went back, by a resume or because its learner was started again, TensorBoard shows one curve: a
  session start ahead of the first update tells it to drop the steps that were undone.
"""

from __future__ import annotations

import math
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from services.metrics import AnyRow, EvalRow, UpdateRow
from services.scalars import scalars


class TensorboardEvents:
    """Writes into one directory; each process run adds a file of its own."""

    def __init__(self, directory: Path) -> None:
        self._writer = EventFileWriter(str(directory))
        self._updates = math.inf
        """Behind the last update that was written; there may be any number from an earlier process."""

    def add(self, row: AnyRow) -> None:
        if isinstance(row, UpdateRow):
            if row.step <= self._updates:
                self._writer.add_event(Event(step=row.step, session_log=SessionLog(status=SessionLog.START)))
            self._updates = row.step
        if isinstance(row, UpdateRow | EvalRow):
            values = [
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in scalars(row).items()
                if value is not None
            ]
            self._writer.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()
