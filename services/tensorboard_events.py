"""TensorBoard event files from metrics rows, written without importing torch.

Promises
- One scalar a number, named section/name; null values are left out.
- After a resume TensorBoard shows one curve: a session start tells it to drop the steps that were undone.
"""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from services.metrics import AnyRow, EvalRow, UpdateRow
from services.scalars import scalars


class TensorboardEvents:
    """Writes into one directory; each process run adds a file of its own."""

    def __init__(self, directory: Path, *, resumed_step: int | None = None) -> None:
        self._writer = EventFileWriter(str(directory))
        if resumed_step is not None:
            self._writer.add_event(
                Event(step=resumed_step + 1, session_log=SessionLog(status=SessionLog.START))
            )

    def add(self, row: AnyRow) -> None:
        if isinstance(row, UpdateRow | EvalRow):
            values = [
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in scalars(row).items()
                if value is not None
            ]
            self._writer.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()
