"""Turns on what only one part of a run may use at a time: a lock in the queue server, with a lease.

Promises
- One part has the turn. Whoever dies loses it with its lease, and at once where the part is made anew;
  whoever lives renews it with every heartbeat.
- A wait has a deadline, and names who has the turn.
- A server that has lost its data gives the turn back to who had it.
- A turn whose lease has ended, or that another part has had since, is an error of `give`.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from contextlib import suppress

import redis
from redis.exceptions import LockError

from services.queue_types import QueueError, QueueTimeout

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05


class TurnLost(QueueError):
    """The turn was another's before this part was done: it was stopped or cut off for longer than a lease."""


class Turn:
    """The turn of one part; safe to renew from another thread.

    Args:
        key: of the lock.
        part: its name, for who waits.
        lease_s: seconds between two renewals that it bears.
    """

    def __init__(self, client: redis.Redis, key: str, part: str, lease_s: float) -> None:
        self._client, self._key, self._part = client, key, part
        self._lease_ms = int(lease_s * 1000)
        self._lock = client.lock(key, timeout=lease_s, sleep=LOOK_EVERY_S, thread_local=False)
        self._token: bytes | None = None
        self._until = 0.0
        """Monotonic; the lease lasts at least so long."""
        self._ended = False
        self._guard = threading.Lock()

    @property
    def held(self) -> bool:
        return self._token is not None

    def take(self, deadline_s: float) -> None:
        """Returns with the turn.

        Raises:
            QueueTimeout: another part has had it all the time.
        """
        self._end_former_life()
        token = f"{self._part} {uuid.uuid4().hex}".encode()
        if not self._acquire(token, deadline_s):
            raise QueueTimeout(
                f"{self._part} waited {deadline_s:g} s for its turn; {self._holder() or 'nobody'} has it"
            )
        with self._guard:
            self._token, self._ended = token, False

    def _acquire(self, token: bytes, deadline_s: float) -> bool:
        """Asked once a look, since an answer that was lost with its connection is that this part has it."""
        give_up = time.monotonic() + deadline_s
        while True:
            self._until = time.monotonic() + self._lease_ms / 1000
            if self._lock.acquire(blocking=False, token=token):
                return True
            if self._client.get(self._key) == token:
                self._lock.local.token = token
                return True
            if time.monotonic() >= give_up:
                return False
            time.sleep(LOOK_EVERY_S)

    def renew(self) -> None:
        """For another lease; nothing without the turn."""
        with self._guard:
            if self._token is None:
                return
            asked = time.monotonic()
            try:
                self._lock.reacquire()
                self._until = asked + self._lease_ms / 1000
            except LockError:
                # Others may have had it since, and given it back.
                self._ended = self._ended or asked >= self._until
                if self._client.set(self._key, self._token, nx=True, px=self._lease_ms):
                    self._until = asked + self._lease_ms / 1000
                    logger.warning("the turn of %s was gone, and is taken again", self._part)
                else:
                    logger.warning("the turn of %s is now that of %s", self._part, self._holder())

    def give(self) -> None:
        """The turn is over.

        Raises:
            TurnLost: it was over before.
        """
        with self._guard:
            self._token = None
            ended = self._ended
            try:
                self._lock.release()
            except LockError as error:
                if (other := self._holder()) is not None:
                    raise TurnLost(f"{self._part} has lost its turn; {other} has it") from error
                # Given before, by a command whose answer was lost; or the server has lost its data.
                logger.warning("the turn of %s was gone when it was given", self._part)
                ended = ended or time.monotonic() >= self._until
            if ended:
                raise TurnLost(f"{self._part} had lost its turn for a while: its lease had ended")

    def _end_former_life(self) -> None:
        """A part that is made anew is alone of its name: who had the turn by this name is dead."""
        found = self._client.get(self._key)
        if isinstance(found, bytes) and found.startswith(f"{self._part} ".encode()):
            former = self._client.lock(self._key, thread_local=False)
            former.local.token = found
            with suppress(LockError):
                former.release()

    def _holder(self) -> str | None:
        found = self._client.get(self._key)
        return found.decode().partition(" ")[0] if isinstance(found, bytes) else None
