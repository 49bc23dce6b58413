"""Weights straight from the learner to each worker, through a connection of the two.

Promises
- Neither Ray's object store nor a disk holds them, and their publisher holds one version of each kind: for
  full fine-tuning of large models.
- Who wants a version asks for it by the PolicyStore actor, through which both also find each other.
- Each receiver has its connection for as long as both live. One that dies costs its own connection alone; a
  receiver whose connection broke makes a new one within the same `receive`.
- Every wait has a deadline; a publisher that has ended is known, not waited for.

What they are connected by: services/transports/gloo_pair.py, services/transports/nccl_pair.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from services.messages import WeightsAnnouncement
from services.safetensors_layout import Bytes
from services.transports.base import DEADLINE_S
from services.transports.pair import GRACE_S, Broken, Pair
from services.transports.rendezvous import WeightsRequest

LISTEN_S: Final = 2.0
"""The publisher asks for requests for so long at a time."""
IDLE_S: Final = 3600.0
"""A connection that has carried nothing for so long is closed."""
TRIES: Final = 3
"""Of a `receive`: over the connection that is there, a new one, and another if that met a publisher's end."""

log = logging.getLogger(__name__)


class Connect(Protocol):
    """How a pair is made: see `Pair`."""

    def __call__(self, store: Any, name: str, *, rank: int, deadline_s: float) -> Pair: ...


class PairsTransport:
    """See the module. From the first `send` on a publisher; else a receiver, of one thread.

    Args:
        store: handle of the PolicyStore actor.
        pair: makes a connection.
        deadline_s: for a chunk to arrive, and for every answer.
    """

    def __init__(self, store: Any, pair: Connect, *, deadline_s: float = DEADLINE_S) -> None:
        self._store, self._pair = store, pair
        self._deadline_s = deadline_s
        self._name = uuid4().hex[:12]
        # Of a publisher.
        self._kept: dict[str, tuple[WeightsAnnouncement, Bytes]] = {}
        self._sending: dict[str, int] = {}
        self._changed = threading.Condition()
        self._connections: dict[str, Pair] = {}
        self._listener: threading.Thread | None = None
        self._closed = threading.Event()
        # Of a receiver.
        self._connection: Pair | None = None

    def reclaim(self, kind: str) -> Bytes | None:
        """Waits for who is just receiving it."""
        with self._changed:
            found = self._kept.pop(kind, None)
            done = self._changed.wait_for(lambda: not self._sending.get(kind), self._deadline_s)
        if not done:
            log.warning("weights %s: a worker is still receiving them: the next ones take more memory", kind)
        return found[1] if found is not None and done else None

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        # At every version: without the store nobody would hear of it.
        listened = ray.get(self._store.publisher_there.remote(self._name), timeout=self._deadline_s)
        with self._changed:
            self._kept[announcement.kind] = (announcement, payload)
        if not listened or self._listener is None or not self._listener.is_alive():
            ray.get(self._store.publisher_begins.remote(self._name), timeout=self._deadline_s)
            self._listener = threading.Thread(target=self._listen, name="weights", daemon=True)
            self._listener.start()

    def close(self) -> None:
        self._closed.set()
        if self._listener is None:
            return
        try:
            ray.get(self._store.publisher_ends.remote(self._name), timeout=GRACE_S)
        except (GetTimeoutError, RayActorError) as error:
            log.warning("the store was not told that the publisher ends: %s", type(error).__name__)

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        where = f"weights {announcement.kind} {announcement.version}"
        for _ in range(TRIES):
            answer = self._ask(announcement, where)
            if answer is None:
                log.warning("%s: nobody publishes", where)
                return None
            try:
                if answer == "reconnect":
                    raise Broken("the publisher is another one")
                connection = self._connection or self._connect(self._next)
                self._connection = connection
                payload = connection.receive(announcement.bytes)
            except Broken as error:
                log.info("%s: the connection to their publisher is made anew: %s", where, error)
                broken, self._connection = self._connection, None
                if broken is not None:
                    broken.close()
                continue
            if payload is None:
                log.warning("%s: their publisher has newer ones", where)
            return payload
        log.warning("%s: there was no connection to their publisher", where)
        return None

    def _ask(self, announcement: WeightsAnnouncement, where: str) -> str | None:
        self._next = f"{self._name}-{uuid4().hex[:8]}"
        asked = WeightsRequest(
            receiver=self._name,
            connection=self._connection.name if self._connection is not None else self._next,
            connected=self._connection is not None,
            kind=announcement.kind,
            version=announcement.version,
        )
        told = self._store.request.remote(asked.model_dump_json(), self._deadline_s)
        try:
            answer: str | None = ray.get(told, timeout=self._deadline_s + GRACE_S)
        except GetTimeoutError as error:
            raise TimeoutError(f"{where}: the policy store did not answer") from error
        except RayActorError as error:
            log.warning("%s: the policy store is gone: %s", where, type(error).__name__)
            return None
        return answer

    def _listen(self) -> None:
        # A call of Ray in a process that has left it would join whatever Ray it finds.
        while not self._closed.is_set() and ray.is_initialized():
            try:
                told = ray.get(
                    self._store.next_request.remote(self._name, LISTEN_S), timeout=LISTEN_S + GRACE_S
                )
                if told is not None:
                    asked = WeightsRequest.model_validate_json(told)
                    # A thread each: who is slow, or dies, keeps nobody else waiting.
                    threading.Thread(
                        target=self._answer, args=(asked,), name=f"weights to {asked.receiver}", daemon=True
                    ).start()
            except Exception:  # whatever it was, the next request must be heard
                if not self._closed.wait(LISTEN_S):
                    log.warning("a request for weights was not heard", exc_info=True)

    def _answer(self, asked: WeightsRequest) -> None:
        own = self._connections.get(asked.receiver)
        known = own is not None and asked.connected and own.name == asked.connection
        self._store.answer.remote(asked.id, "come" if known or not asked.connected else "reconnect")
        if asked.connected and not known:
            return
        try:
            if own is None or not known:
                if own is not None:
                    own.close()
                own = self._connections[asked.receiver] = self._connect(asked.connection, rank=0)
                self._close_idle()
            # Only now: who does not come keeps no publish waiting.
            with self._sent(asked) as payload:
                own.send(payload)
        except Broken as error:
            log.warning(
                "weights %s %s did not reach %s: %s", asked.kind, asked.version, asked.receiver, error
            )
            # Not one that the receiver has made since.
            if own is not None and self._connections.get(asked.receiver) is own:
                del self._connections[asked.receiver]
            if own is not None:
                own.close()

    def _close_idle(self) -> None:
        """Nobody tells of receivers that are no more; one that lives connects again."""
        for receiver, connection in list(self._connections.items()):
            if time.monotonic() - connection.used > IDLE_S:
                self._connections.pop(receiver).close()

    @contextmanager
    def _sent(self, asked: WeightsRequest) -> Iterator[Bytes | None]:
        """What was asked for, which nobody writes over inside the block; None if it is not there any more."""
        with self._changed:
            announcement, payload = self._kept.get(asked.kind, (None, None))
            if announcement is None or announcement.version != asked.version:
                payload = None
            self._sending[asked.kind] = self._sending.get(asked.kind, 0) + 1
        try:
            yield payload
        finally:
            with self._changed:
                self._sending[asked.kind] -= 1
                self._changed.notify_all()

    def _connect(self, name: str, *, rank: int = 1) -> Pair:
        return self._pair(self._store, name, rank=rank, deadline_s=self._deadline_s)
