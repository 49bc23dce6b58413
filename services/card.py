"""The card that the parts of a colocated run take turns on (`cluster.colocate`).

Promises
- A part computes on the card in its turn only, and before it gives the turn up its state is off the card.
- What it waits for is in its heartbeat; the wait has a deadline.
- Each turn is a line in the part's log, with when it began and ended.

Where parts have cards of their own there is nothing to wait for: `OwnCard`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from services.config import Config
from services.group_queue import GroupQueue
from services.heartbeat import Pulse
from services.queue_turn import Turn

logger = logging.getLogger(__name__)

TURN = "turn on the card: %.6f to %.6f, waited %.3f s, moved in %.3f s and out %.3f s"


class Movable(Protocol):
    """State that a process has on the card (policy/parking.py)."""

    def leave(self) -> None:
        """To host memory."""
        ...

    def come_back(self) -> None:
        """Onto the card."""
        ...


class OwnCard:
    """Nobody else is on it."""

    state: Movable | None = None

    def take(self) -> None:
        """Have the turn; nothing happens where this part has it."""

    def give(self) -> None:
        """Give the turn up; nothing happens where this part has none."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """With the turn inside the block."""
        self.take()
        try:
            yield
        finally:
            self.give()


class SharedCard(OwnCard):
    """Others are on it too.

    Args:
        turn: of this part.
        pulse: of this part, which renews the turn.
        deadline_s: that a wait for the turn may take.
    """

    def __init__(self, turn: Turn, pulse: Pulse, deadline_s: float) -> None:
        self._turn, self._pulse, self._deadline_s = turn, pulse, deadline_s
        self._since = self._waited_s = self._moved_s = 0.0
        pulse.keep(turn.renew)

    def take(self) -> None:
        if self._turn.held:
            return
        asked = time.monotonic()
        self._pulse.enter("waiting for its turn", waits=True)
        self._turn.take(self._deadline_s)
        taken = time.monotonic()
        self._since, self._waited_s = time.time(), taken - asked
        self._pulse.enter("moving onto the card")
        if self.state is not None:
            try:
                self.state.come_back()
            except BaseException:
                self._turn.give()
                raise
        self._moved_s = time.monotonic() - taken

    def give(self) -> None:
        if not self._turn.held:
            return
        began = time.monotonic()
        self._pulse.enter("moving off the card")
        try:
            if self.state is not None:
                self.state.leave()
            logger.info(
                TURN, self._since, time.time(), self._waited_s, self._moved_s, time.monotonic() - began
            )
        finally:
            self._turn.give()


def card_of(config: Config, queue: GroupQueue, pulse: Pulse) -> OwnCard:
    """Of the part that beats with this pulse."""
    if not config.cluster.colocate:
        return OwnCard()
    turn = queue.turn(pulse.part, config.queue.lease_s)
    return SharedCard(turn, pulse, config.groups_deadline_s)
