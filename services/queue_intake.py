"""How the learner reads the stream of groups: each entry verified, refused ones sent back, none twice.

Promises
- What is kept in `_taken` was admitted, is whole, proven and not stale; the rest is refused with a reason,
  its ordinal issued again, its entry removed.
- Entries that were delivered into a broken connection are read again.
- A fenced learner and a server that lost writes are noticed at the next read.
- A read is one round trip, and one more for each handful of large payloads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import redis

from services.codec import CorruptGroup, Group, decode_group
from services.config import QueueConfig
from services.messages import PolicyVersion
from services.queue_board import QueueBoard
from services.queue_types import Fenced, StateLost

READ_COUNT = 64
PAYLOADS_AT_ONCE = 8
"""Large payloads fetched in one go: bounds what a reply takes in memory."""
CONSUMER = "learner"
log = logging.getLogger(__name__)


class QueueIntake(QueueBoard):
    """The groups that this learner has read and not yet committed."""

    def __init__(self, client: redis.Redis, run: str, config: QueueConfig) -> None:
        super().__init__(client, run, config)
        self._taken: dict[int, tuple[bytes, Group]] = {}
        """Ordinal -> (stream entry, group)."""
        self.opening_s = 0.0
        """Seconds spent so far on fetching payloads, verifying and decoding what was read."""

    def _accept(self, answer: Sequence[bytes], version: PolicyVersion) -> None:
        if answer[0] == b"FENCED":
            raise Fenced(f"the learner at {version} was replaced: the queue is at {answer[1].decode()}")
        if answer[0] == b"LOST":
            raise StateLost(
                f"the learner is at {version}, the queue at {answer[1].decode()}: the server lost writes; "
                "begin an epoch from a checkpoint"
            )

    def _read(self, version: PolicyVersion, block_s: float) -> tuple[bool, str | None]:
        """One read from the stream into `_taken`, at most `block_s` long, in one round trip.

        Returns:
            Whether there may be more at once, and the run's state.
        """
        group = f"learner:{version.epoch}"
        pipeline = self._client.pipeline(transaction=False)
        block_ms = max(1, int(block_s * 1000)) if block_s else None
        pipeline.xreadgroup(group, CONSUMER, {self._keys.groups: ">"}, count=READ_COUNT, block=block_ms)
        pipeline.hmget(self._keys.key("policy"), "epoch", "step", "state")
        pipeline.xpending(self._keys.groups, group)
        streams, (epoch, step, state), pending = pipeline.execute(raise_on_error=False)
        self._compare(version, epoch, step)
        for answer in (streams, pending):
            if isinstance(answer, Exception):
                # The consumer group goes with its epoch.
                if "NOGROUP" in str(answer) or "UNBLOCKED" in str(answer):
                    raise StateLost(f"the queue no longer knows the learner at {version}") from answer
                raise answer
        entries = streams[0][1] if streams else []
        expected = len(self._taken) + len(entries)
        self._open(version, entries)
        if pending["pending"] > expected:
            self._recover(version, group)
        return len(entries) == READ_COUNT, state.decode() if state is not None else None

    def _recover(self, version: PolicyVersion, group: str) -> None:
        """Entries that were delivered into a connection that broke: pending, and never seen here."""
        known, last = {entry for entry, _ in self._taken.values()}, b"0"
        while True:
            answer = self._client.xreadgroup(group, CONSUMER, {self._keys.groups: last}, count=READ_COUNT)
            entries = answer[0][1] if answer else []
            if not entries:
                return
            self._open(version, [entry for entry in entries if entry[0] not in known])
            last = entries[-1][0]

    def _compare(self, version: PolicyVersion, epoch: bytes | None, step: bytes | None) -> None:
        if epoch is None or step is None:
            self._accept([b"LOST", b"none"], version)
        elif (int(epoch), int(step)) != (version.epoch, version.step):
            kind = b"FENCED" if int(epoch) > version.epoch else b"LOST"
            self._accept([kind, epoch + b"." + step], version)

    def _open(self, version: PolicyVersion, entries: list[Any]) -> None:
        started = time.monotonic()
        for part in range(0, len(entries), PAYLOADS_AT_ONCE):
            chosen = entries[part : part + PAYLOADS_AT_ONCE]
            ordinals = [_ordinal(fields) for _, fields in chosen]
            records, payloads = self._beside(chosen, ordinals)
            for (entry, fields), ordinal, record, payload in zip(
                chosen, ordinals, records, payloads, strict=True
            ):
                if record is None or not record.startswith(entry + b" "):
                    self._refuse(version, entry, ordinal, "was never admitted", counted=False)
                    continue
                try:
                    group = _decode(fields, payload, f"{self._run}-{ordinal}")
                    admitted_as = b".".join(record.split(b" ", 3)[1:3]).decode()
                    if str(group.header.version) != admitted_as:
                        says = f"says version {group.header.version}, admitted as {admitted_as}"
                        raise CorruptGroup(group.group_id, says)
                except CorruptGroup as error:
                    self._refuse(version, entry, ordinal, error.reason, counted=True)
                    continue
                self._taken[ordinal] = (entry, group)
        self.opening_s += time.monotonic() - started
        self._drop_stale(version, [_ordinal(fields) for _, fields in entries])

    def _beside(
        self, entries: list[Any], ordinals: list[int]
    ) -> tuple[list[bytes | None], list[bytes | None]]:
        """What belongs to the entries and is not in them: their records, and the large payloads."""
        payloads = [(fields or {}).get(b"payload") for _, fields in entries]
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hmget(self._keys.key("queued"), ordinals)
        large = [place for place, payload in enumerate(payloads) if payload is None]
        if large:
            digests = [((entries[place][1] or {}).get(b"sha256") or b"").decode("latin-1") for place in large]
            pipeline.mget([self._keys.payload(digest) for digest in digests])
        records, *found = pipeline.execute()
        for place, payload in zip(large, found[0] if found else [], strict=True):
            payloads[place] = payload
        return records, payloads

    def _drop_stale(self, version: PolicyVersion, ordinals: Iterable[int]) -> None:
        for ordinal in ordinals:
            if ordinal not in self._taken:
                continue
            entry, group = self._taken[ordinal]
            behind = version.step - group.header.version.step
            if behind > self._config.max_staleness:
                del self._taken[ordinal]
                self._refuse(version, entry, ordinal, f"is {behind} steps old", counted=False)

    def _refuse(
        self, version: PolicyVersion, entry: bytes, ordinal: int, reason: str, *, counted: bool
    ) -> None:
        answer = self._scripts.run(
            "refuse",
            version.epoch,
            version.step,
            entry,
            ordinal,
            int(counted),
            reason,
            self._config.max_attempts,
        )
        self._accept(answer, version)
        log.warning(
            "group refused: %s",
            reason,
            extra={"run": self._run, "ordinal": ordinal, "fate": answer[0].decode()},
        )


def _ordinal(fields: dict[bytes, bytes] | None) -> int:
    try:
        return int((fields or {})[b"ordinal"])
    except (KeyError, ValueError):
        return -1


def _decode(fields: dict[bytes, bytes], payload: bytes | None, group_id: str) -> Group:
    header, digest = fields.get(b"header"), fields.get(b"sha256")
    if header is None or digest is None or payload is None:
        raise CorruptGroup(group_id, f"has no payload, or lacks a field; its entry has {sorted(fields)}")
    return decode_group(header, payload, digest.decode(errors="replace"), group_id=group_id)
