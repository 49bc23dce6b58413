"""SIGINT and SIGTERM as a wish to stop, not as an exception in the middle of something.

Promises
- The first signal only sets a flag: the run drains, writes a checkpoint and ends with 130.
- Before there is anything to drain, `check` ends the run between two stages of its start.
- The second one ends the process at once; the last complete checkpoint is what remains.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130


class Interrupted(Exception):
    """Somebody wants the run to stop, and it has not begun to train."""


class StopSignals:
    """Installed inside the block; `requested` tells whether somebody wants the run to stop."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._caught)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted when somebody wants the run to stop."""
        if self.requested.is_set():
            raise Interrupted("stopped before training began; --resume RUN_DIR begins again")

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.requested.is_set():
            sys.stderr.write("\nstopped at once: resume goes on from the last complete checkpoint\n")
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        self.requested.set()
