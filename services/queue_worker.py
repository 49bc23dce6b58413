"""The worker's side of the group queue: ask for an ordinal, keep it, bring the group or say why not.

Promises
- `issue` hands out work only while there is room for it; None means wait, `RunEnded` means go home.
- A worker that dies loses its lease, not the ordinal.
- Of large payloads a few at a time are on their way into the server, which answers everybody else meanwhile.
- `admit` has happened wholly or not at all, whatever it answers; sending a group twice is harmless.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import redis

from services.codec import EncodedGroup
from services.config import QueueConfig
from services.messages import PolicyVersion
from services.queue_scripts import BESIDE, INLINE, Argument, Keys, Scripts
from services.queue_types import Admitted, Failed, Lease, NotAssigned, RunEnded

INLINE_BYTES = 64 * 1024
"""A larger payload is not handed through Lua, where it would be copied three times, but SET beside."""
BLOB_TTL_MS = 60_000
"""What a worker that dies between the two leaves behind is gone after this."""
UPLOAD_WAIT_S = 10.0
"""After this a payload is sent whether there is leave for it or not: what is bounded is a burden, no more."""
BLOCK_S = 2.0
"""Longest single blocking read; well below the socket timeout of services/queue_connection.py."""


PLAN_WAIT_S = 2.0
"""Between the beginning of an epoch and its first plan there is a moment."""
PLAN_POLL_S = 0.05


class QueueWorker:
    """What a rollout worker does with the queue."""

    def __init__(self, client: redis.Redis, run: str, config: QueueConfig) -> None:
        # redis-py types each answer as a union over protocols and decodings; ours is fixed by `connect`.
        self._client: Any = client
        self._run = run
        self._config = config
        self._keys = Keys(run)
        self._scripts = Scripts(client, self._keys)
        self._waits_as: str | None = None
        self._next_expiry_s: float | None = None

    @property
    def run(self) -> str:
        return self._run

    def issue(self, worker: str) -> Lease | None:
        """The next ordinal for `worker`, or None if it has to wait (see `wait_for_work`).

        An expired lease comes first, then the lowest ordinal that is to be issued again, then the next number
        while the window and the run's limit allow it. Workers that have to wait stand in a line: who has
        waited longest is next, and loses its turn if it does not ask within two seconds of being called.

        Raises:
            RunEnded: the run is draining, done or failed.
        """
        lease_ms = int(self._config.lease_s * 1000)
        answer = self._scripts.run("issue", worker, uuid.uuid4().hex, lease_ms, self._config.max_attempts)
        if answer[0] == b"ENDED":
            raise RunEnded(answer[1].decode())
        if answer[0] == b"WAIT":
            self._waits_as = worker
            self._next_expiry_s = int(answer[1]) / 1000 if int(answer[1]) >= 0 else None
            return None
        ordinal, attempt, epoch, step = map(int, answer[1:])
        return Lease(ordinal, attempt, PolicyVersion(epoch=epoch, step=step))

    def wait_for_work(self, timeout_s: float) -> bool:
        """After `issue` said None: block until it is this worker's turn, at most `timeout_s`.

        Returns at once if it has been since that `issue`; False when the time has passed.
        """
        assert self._waits_as is not None, "nothing was asked for"
        if self._next_expiry_s is not None:
            timeout_s = min(timeout_s, self._next_expiry_s + 0.001)
        give_up = time.monotonic() + timeout_s
        while (left := give_up - time.monotonic()) > 0:
            if self._client.blpop([self._keys.call(self._waits_as)], timeout=max(0.001, min(left, BLOCK_S))):
                return True
        return False

    def place_of(self, lease: Lease) -> int:
        """Which place of the prompts the ordinal takes; only for a run whose learner plans them.

        Raises:
            NotAssigned: the learner of the lease's epoch has not said so, nor does within `PLAN_WAIT_S`.
        """
        give_up = time.monotonic() + PLAN_WAIT_S
        while True:
            epoch, place = self._client.hmget(self._keys.key("plan"), "epoch", lease.ordinal)
            if epoch is not None and place is not None and int(epoch) >= lease.version.epoch:
                return int(place)
            if time.monotonic() >= give_up:
                raise NotAssigned(
                    f"no prompt is assigned to ordinal {lease.ordinal} (epoch {lease.version.epoch})"
                )
            time.sleep(PLAN_POLL_S)

    def renew(self, worker: str, ordinal: int) -> bool:
        """Hold an ordinal for another `lease_s`; False if it is no longer this worker's."""
        return bool(self._scripts.run("renew", worker, ordinal, int(self._config.lease_s * 1000)))

    def release(self, worker: str, ordinal: int) -> bool:
        """Give an ordinal back unworked; no attempt is counted. False if it was not this worker's."""
        return bool(self._scripts.run("release", worker, 0, self._config.max_attempts, "", ordinal))

    def release_worker(self, worker: str, reason: str) -> list[int]:
        """All that a dead worker held is issued again at once; its attempts count. By whoever saw it die."""
        answer = self._scripts.run("release", worker, 1, self._config.max_attempts, reason)
        return sorted(map(int, answer))

    def fail(self, worker: str, ordinal: int, reason: str) -> Failed:
        """The group could not be made: the ordinal is issued again, or dead after `max_attempts`."""
        answer = self._scripts.run("fail", worker, ordinal, reason, self._config.max_attempts)
        return Failed(answer.decode())

    def admit(self, group: EncodedGroup) -> Admitted:
        """Bring one whole group."""
        return self.admit_many([group])[0]

    def admit_many(self, groups: Sequence[EncodedGroup]) -> list[Admitted]:
        """Bring several groups at once; each has its own verdict, none depends on another's."""
        if not groups:
            return []

        large = any(len(group.payload) > INLINE_BYTES for group in groups)
        leave = self._wait_for_leave() if large else 0

        def pipeline() -> Any:
            filled = self._client.pipeline(transaction=False)
            self._send(filled, groups)
            return filled

        verdicts = self._scripts.send(pipeline, "admit")[-1]
        if large:
            self._scripts.run("leave", leave, self._config.max_uploads, int(UPLOAD_WAIT_S * 1000))
        if isinstance(verdicts, redis.exceptions.OutOfMemoryError):
            return [Admitted.FULL] * len(groups)
        if isinstance(verdicts, Exception):
            raise verdicts
        return [Admitted(verdict.decode()) for verdict in verdicts]

    def _wait_for_leave(self) -> int:
        """Until fewer than `max_uploads` large payloads are on their way; who has waited longest goes first.

        Returns:
            The number of the leave, to give back; 0 for who has waited in vain and sends without. Leaves that
            workers took to their graves are replaced by that.
        """
        give_up = time.monotonic() + UPLOAD_WAIT_S
        while (left := give_up - time.monotonic()) > 0:
            found = self._client.blpop([self._keys.uploads], timeout=max(0.001, min(left, BLOCK_S)))
            if found:
                return int(found[1])
        return 0

    def _send(self, pipeline: Any, groups: Sequence[EncodedGroup]) -> None:
        arguments: list[Argument] = [
            self._config.max_attempts,
            self._config.max_groups,
            self._config.max_bytes,
        ]
        blobs = []
        for group in groups:
            place, body = INLINE, group.header
            if len(group.payload) <= INLINE_BYTES:
                body += group.payload
            else:
                place = BESIDE
                blobs.append(self._keys.payload(group.sha256))
                # NX: sent a second time, it must not give a group that is already admitted a time to live.
                pipeline.set(blobs[-1], group.payload, px=BLOB_TTL_MS, nx=True)
            description = (
                f"{group.ordinal} {group.version.epoch} {group.version.step} {len(group.header)} "
                f"{len(group.payload)} {place} {group.sha256} {group.worker}"
            )
            arguments += (description, body)
        self._scripts.queue(pipeline, "admit", arguments, *blobs)
