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
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import redis

from services.codec import CorruptGroup, Group, decode_group
from services.config import QueueConfig
from services.messages import PolicyVersion
from services.queue_board import QueueBoard
from services.queue_scripts import BESIDE
from services.queue_types import Fenced, StateLost

READ_COUNT = 64
PAYLOADS_AT_ONCE = 8
"""Large payloads fetched in one go: bounds what a reply takes in memory."""
CONSUMER = "learner"
RECORD = re.compile(rb"(\S+) (\d+) (\d+) (\d+) \d+ (inline|beside) ([0-9a-f]+) ")
log = logging.getLogger(__name__)


class Record(NamedTuple):
    """What `admit` wrote down about a group (prelude.lua)."""

    version: str
    header_bytes: int
    place: str
    sha256: str


class Entry(NamedTuple):
    """An entry of the stream as it was found there; empty bytes for what it lacks."""

    entry: bytes
    """Its id."""
    number: bytes
    """The ordinal that it claims to be; no number if none of that name was admitted."""
    recorded: bytes
    """What `admit` wrote down about that ordinal."""
    body: bytes
    """Header and payload, or the header alone of a large group."""

    @property
    def ordinal(self) -> int:
        return int(self.number) if self.number.isdigit() else -1

    @property
    def record(self) -> Record | None:
        """None for an entry that was never admitted, or by another version of this queue."""
        found = RECORD.match(self.recorded)
        if found is None or found[1] != self.entry:
            return None
        epoch, step, header_bytes, place, sha256 = (part.decode() for part in found.groups()[1:])
        return Record(f"{epoch}.{step}", int(header_bytes), place, sha256)


class QueueIntake(QueueBoard):
    """The groups that this learner has read and not yet committed."""

    def __init__(self, client: redis.Redis, run: str, config: QueueConfig) -> None:
        super().__init__(client, run, config)
        self._taken: dict[int, tuple[bytes, Group]] = {}
        """Ordinal -> (stream entry, group)."""
        self._last_seen = b"0-0"
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

    def _read(self, version: PolicyVersion) -> tuple[bool, str]:
        """What is in the stream now, into `_taken`: one round trip.

        Returns:
            Whether there may be more at once, and the run's state.
        """
        state, pending, entries = self._entries(version, b">")
        expected = len(self._taken) + len(entries)
        self._open(version, entries)
        if pending > expected:
            # Delivered into a connection that broke: pending, and never seen here.
            known, last = {entry for entry, _ in self._taken.values()}, b"0"
            while missed := self._entries(version, last)[2]:
                self._open(version, [found for found in missed if found.entry not in known])
                last = missed[-1].entry
        return len(entries) == READ_COUNT, state

    def _wait(self, block_s: float) -> None:
        """Until something arrives, at most `block_s`."""
        block_ms = max(1, int(block_s * 1000))
        self._client.xread({self._keys.groups: self._last_seen}, count=1, block=block_ms)

    def _entries(self, version: PolicyVersion, after: bytes) -> tuple[str, int, list[Entry]]:
        try:
            answer = self._scripts.run("read", version.epoch, version.step, CONSUMER, READ_COUNT, after)
        except redis.ResponseError as error:
            # The consumer group goes with its epoch.
            if "NOGROUP" not in str(error):
                raise
            raise StateLost(f"the queue no longer knows the learner at {version}") from error
        self._accept(answer, version)
        state, pending, *parts = answer
        entries = []
        for description, body in zip(parts[::2], parts[1::2], strict=True):
            entry, number, recorded = description.split(b" ", 2)
            entries.append(Entry(entry, number, recorded, body))
        if entries:
            self._last_seen = max(self._last_seen, entries[-1].entry, key=_place)
        return state.decode(), pending, entries

    def _open(self, version: PolicyVersion, entries: list[Entry]) -> None:
        started = time.monotonic()
        for part in range(0, len(entries), PAYLOADS_AT_ONCE):
            chosen = [(found, found.record) for found in entries[part : part + PAYLOADS_AT_ONCE]]
            beside = self._payloads_beside([record for _, record in chosen if record is not None])
            for found, record in chosen:
                ordinal = found.ordinal
                if record is None:
                    self._refuse(version, found.entry, ordinal, "was never admitted", counted=False)
                    continue
                try:
                    group = _decode(found.body, record, beside, f"{self._run}-{ordinal}")
                except CorruptGroup as error:
                    self._refuse(version, found.entry, ordinal, error.reason, counted=True)
                    continue
                self._taken[ordinal] = (found.entry, group)
        self.opening_s += time.monotonic() - started
        self._drop_stale(version, [found.ordinal for found in entries])

    def _payloads_beside(self, records: list[Record]) -> dict[str, bytes]:
        """sha256 -> payload of the large groups; what is gone is left out."""
        digests = [record.sha256 for record in records if record.place == BESIDE]
        if not digests:
            return {}
        payloads = self._client.mget([self._keys.payload(digest) for digest in digests])
        return {digest: payload for digest, payload in zip(digests, payloads, strict=True) if payload}

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


def _place(entry: bytes) -> list[int]:
    """Entry ids in the order of the stream."""
    return [int(part) for part in entry.split(b"-")]


def _decode(body: bytes, record: Record, beside: Mapping[str, bytes], group_id: str) -> Group:
    if record.place == BESIDE:
        header, payload = body, memoryview(beside.get(record.sha256, b""))
    else:
        header, payload = body[: record.header_bytes], memoryview(body)[record.header_bytes :]
    if not payload:
        raise CorruptGroup(group_id, "has no payload")
    group = decode_group(header, payload, record.sha256, group_id=group_id)
    if str(group.header.version) != record.version:
        raise CorruptGroup(group_id, f"says version {group.header.version}, admitted as {record.version}")
    return group
