"""The pulse of a part: says every few seconds what it is doing, and keeps its leases alive.

Promises
- A beat carries the state, since when, the policy version and the peak memory: whoever watches can name what
  a silent part was last doing.
- Leases are renewed by the same thread, so a part that is stopped or dead loses both at once.
- A failed beat is logged and tried again; it never ends the work.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from services.messages import Heartbeat, PolicyVersion

logger = logging.getLogger(__name__)

BEATS_TO_LIVE = 5
"""A heartbeat is kept this many intervals: five missed ones and the part is gone."""


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Pulse:
    """A thread that beats.

    Args:
        part: `rollout-0`, `learner-0`, `evaluator`.
        beat: sends one heartbeat (GroupQueue.beat with a time to live).
        renew: keeps the lease of one ordinal alive; None for parts without leases.
        every_s: seconds between two beats.
    """

    def __init__(
        self,
        part: str,
        beat: Callable[[Heartbeat], None],
        renew: Callable[[int], object] | None = None,
        *,
        every_s: float = 2.0,
    ) -> None:
        self.part = part
        self.groups = 0
        self.version: PolicyVersion | None = None
        self.probe_error: float | None = None
        self._beat = beat
        self._renew = renew
        self._every_s = every_s
        self._state = "starting"
        self._since = time.time()
        self._ordinal: int | None = None
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"pulse-{part}", daemon=True)

    def __enter__(self) -> Pulse:
        self._send()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._send()

    def enter(self, state: str, *, ordinal: int | None = None) -> None:
        """From now on the part is doing this."""
        with self._lock:
            if (state, ordinal) != (self._state, self._ordinal):
                self._state, self._ordinal, self._since = state, ordinal, time.time()

    def hold(self, ordinal: int) -> None:
        """Renew this lease with every beat."""
        with self._lock:
            self._held.add(ordinal)

    def let_go(self, ordinal: int) -> None:
        """The lease has ended, one way or another."""
        with self._lock:
            self._held.discard(ordinal)

    def snapshot(self) -> Heartbeat:
        """What the next beat would say."""
        with self._lock:
            return Heartbeat(
                part=self.part,
                state=self._state,
                since=self._since,
                version=self.version,
                ordinal=self._ordinal,
                groups=self.groups,
                rss_bytes=peak_rss_bytes(),
                probe_error=self.probe_error,
                pid=os.getpid(),
                node=socket.gethostname(),
            )

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._send()

    def _send(self) -> None:
        with self._lock:
            held = tuple(self._held)
        try:
            self._beat(self.snapshot())
            if self._renew is not None:
                for ordinal in held:
                    self._renew(ordinal)
        except Exception:
            logger.warning("%s: heartbeat failed, trying again", self.part, exc_info=True)
