"""The pulse of a part: says every few seconds what it is doing, keeps its leases alive, ends it if it hangs.

Promises
- A beat carries the state, since when, the policy version and the peak memory: whoever watches can name what
  a silent part was last doing.
- Leases are renewed by the same thread, so a part that is stopped or dead loses both at once.
- A failed beat is logged and tried again; it never ends the work.
- A part that does one thing for longer than it may writes the stacks of its threads into its log, says so in
  a last beat, and ends its process: whoever keeps it alive makes it anew. What it waits for others to do is
  not counted: that has deadlines of its own.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from services.messages import Heartbeat, PolicyVersion

logger = logging.getLogger(__name__)

BEATS_TO_LIVE = 5
"""A heartbeat is kept this many intervals: five missed ones and the part is gone."""
GOODBYE_S = 10.0
"""For the stacks and the last beat of a part that hangs."""
HUNG_EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Show = Callable[[str, str], None]
"""Told a part and its state."""


def unshown(part: str, state: str) -> None:
    """Nobody is told."""


class Pulse:
    """A thread that beats.

    Args:
        part: `rollout-0`, `learner-0`, `evaluator`.
        beat: sends one heartbeat (GroupQueue.beat with a time to live).
        renew: keeps the lease of one ordinal alive; None for parts without leases.
        every_s: seconds between two beats.
        hang_s: seconds that the part may be at one thing; None: as long as it likes.
        show: told part and state whenever that changes, and with every beat.
    """

    def __init__(
        self,
        part: str,
        beat: Callable[[Heartbeat], None],
        renew: Callable[[int], object] | None = None,
        *,
        every_s: float = 2.0,
        hang_s: float | None = None,
        show: Show = unshown,
    ) -> None:
        self.part = part
        self.groups = 0
        self.version: PolicyVersion | None = None
        self.probe_error: float | None = None
        self.install_s: float | None = None
        self._beat = beat
        self._renew = renew
        self._show = show
        self._every_s = every_s if hang_s is None else min(every_s, hang_s / 3)
        self._hang_s = hang_s
        self._state = "starting"
        self._since = time.time()
        self._until: float | None = None
        self._ordinal: int | None = None
        self._held: set[int] = set()
        self._kept: list[Callable[[], object]] = []
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

    def enter(self, state: str, *, ordinal: int | None = None, waits: bool = False) -> None:
        """From now on the part is doing this.

        Args:
            waits: for what others do, however long it takes.
        """
        with self._lock:
            if (state, ordinal) != (self._state, self._ordinal):
                self._state, self._ordinal, self._since = state, ordinal, time.time()
                self._show(self.part, state)
            self._until = None if waits or self._hang_s is None else time.monotonic() + self._hang_s

    def keep(self, renew: Callable[[], object]) -> None:
        """Call this with every beat too."""
        with self._lock:
            self._kept.append(renew)

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
                install_s=self.install_s,
                pid=os.getpid(),
                node=socket.gethostname(),
            )

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._end_if_hung()
            self._send()

    def _end_if_hung(self) -> None:
        with self._lock:
            if self._until is None or time.monotonic() < self._until:
                return
            self._state = f"hung: {self._state}"
        # Whatever the log and the queue do: a thread that hangs may hold the lock of one.
        last = threading.Timer(GOODBYE_S, os._exit, (HUNG_EXIT_CODE,))
        last.daemon = True
        last.start()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        ]
        logger.critical(
            "%s %s for %g s; it ends\n%s", self.part, self._state, self._hang_s, "\n".join(stacks)
        )
        self._held.clear()
        self._kept.clear()
        self._send()
        os._exit(HUNG_EXIT_CODE)

    def _send(self) -> None:
        with self._lock:
            held, kept = tuple(self._held), tuple(self._kept)
            self._show(self.part, self._state)
        try:
            self._beat(self.snapshot())
            for renew in kept:
                renew()
            if self._renew is not None:
                for ordinal in held:
                    self._renew(ordinal)
        except Exception:
            logger.warning("%s: heartbeat failed, trying again", self.part, exc_info=True)
