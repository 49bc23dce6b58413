"""Gives the rewards of a run the replicas that `dgpo scale` asks for.

Promises
- Asking Serve waits for nobody: it is done in a thread, one change at a time.
- A try that fails is told and made again, as long as it is wanted; it never ends the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Final, NamedTuple

from services.formatting import reason

AGAIN_S: Final = 10.0
"""Between two tries."""


class Told(NamedTuple):
    """What became of a wish."""

    what: str
    detail: str
    failed: bool


class RewardScaling:
    """See the module.

    Args:
        scale: asks Serve for so many replicas of a reward.
        again_s: seconds between two tries.
    """

    def __init__(self, scale: Callable[[str, int], None], *, again_s: float = AGAIN_S) -> None:
        self._scale, self._again_s = scale, again_s
        self.asked: dict[str, int] = {}
        """Reward -> replicas that Serve was asked for."""
        self._under_way: tuple[str, int, Future[None]] | None = None
        self._not_before: dict[str, float] = {}
        """Reward -> when it is tried again (monotonic)."""

    def turn(self, wanted: Mapping[str, int]) -> Iterator[Told]:
        """Begin what is wanted and was not asked for; what has come of that which was begun."""
        if self._under_way is not None:
            name, count, asked = self._under_way
            if not asked.done():
                return
            self._under_way = None
            error = asked.exception()
            if error is None:
                self.asked[name] = count
                yield Told("reward scaled", f"{name}: {count} replicas asked for", failed=False)
            else:
                self._not_before[name] = time.monotonic() + self._again_s
                yield Told("reward not scaled", f"{name} keeps its replicas: {reason(error)}", failed=True)
        now = time.monotonic()
        for name, count in wanted.items():
            if self.asked.get(name) != count and now >= self._not_before.get(name, now):
                self._under_way = name, count, self._begin(name, count)
                return

    def _begin(self, name: str, count: int) -> Future[None]:
        future: Future[None] = Future()

        def ask() -> None:
            try:
                self._scale(name, count)
            except BaseException as error:  # handed to the next turn
                future.set_exception(error)
            else:
                future.set_result(None)

        # A daemon: a Serve that hangs does not keep the driver from ending.
        threading.Thread(target=ask, name=f"scale {name}", daemon=True).start()
        return future
