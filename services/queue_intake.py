"""How the learner reads the stream of groups: each entry verified, refused ones sent back, none twice.

Promises
- What is kept in `_taken` was admitted, is whole, proven and not stale; the rest is refused with a reason,
  its ordinal issued again, its entry removed.
- Entries that were delivered into a broken connection are read again.
- A fenced learner and a server that lost writes are noticed at the next read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import redis

from services.codec import CorruptGroup, Group, decode_group
from services.config import QueueConfig
from services.messages import PolicyVersion
from services.queue_board import QueueBoard
from services.queue_types import Fenced, StateLost

READ_COUNT = 8
CONSUMER = "learner"
log = logging.getLogger(__name__)


class QueueIntake(QueueBoard):
    """The groups that this learner has read and not yet committed."""

    def __init__(self, client: redis.Redis, run: str, config: QueueConfig) -> None:
        super().__init__(client, run, config)
        self._taken: dict[int, tuple[bytes, Group]] = {}
        """Ordinal -> (stream entry, group)."""
        self.opening_s = 0.0
        """Seconds spent so far on verifying and decoding what was read."""

    def _accept(self, answer: Sequence[bytes], version: PolicyVersion) -> None:
        if answer[0] == b"FENCED":
            raise Fenced(f"the learner at {version} was replaced: the queue is at {answer[1].decode()}")
        if answer[0] == b"LOST":
            raise StateLost(
                f"the learner is at {version}, the queue at {answer[1].decode()}: the server lost writes; "
                "begin an epoch from a checkpoint"
            )

    def _check(self, version: PolicyVersion) -> str | None:
        epoch, step, state = self._client.hmget(self._keys.key("policy"), "epoch", "step", "state")
        if epoch is None:
            self._accept([b"LOST", b"none"], version)
        elif (int(epoch), int(step)) != (version.epoch, version.step):
            kind = b"FENCED" if int(epoch) > version.epoch else b"LOST"
            self._accept([kind, epoch + b"." + step], version)
        return state.decode() if state is not None else None

    def _read(self, version: PolicyVersion, block_s: float) -> bool:
        """One read from the stream into `_taken`; False if nothing came."""
        group = f"learner:{version.epoch}"
        entries = self._entries(version, group, ">", max(1, int(block_s * 1000)) if block_s else None)
        if entries:
            self._open(version, entries)
            return True
        # A connection that broke under the reply leaves entries that were delivered and never seen.
        if self._client.xpending(self._keys.groups, group)["pending"] <= len(self._taken):
            return False
        last, known, recovered = b"0", {entry for entry, _ in self._taken.values()}, False
        while entries := self._entries(version, group, last, None):
            fresh = [entry for entry in entries if entry[0] not in known]
            self._open(version, fresh)
            last, recovered = entries[-1][0], recovered or bool(fresh)
        return recovered

    def _entries(
        self, version: PolicyVersion, group: str, after: str | bytes, block_ms: int | None
    ) -> list[Any]:
        try:
            answer = self._client.xreadgroup(
                group, CONSUMER, {self._keys.groups: after}, count=READ_COUNT, block=block_ms
            )
        except redis.ResponseError as error:
            # The consumer group goes with its epoch.
            if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
                raise
            self._check(version)
            raise StateLost(f"the queue no longer knows the learner at {version}") from error
        return answer[0][1] if answer else []

    def _open(self, version: PolicyVersion, entries: list[Any]) -> None:
        if not entries:
            return
        ordinals = [_ordinal(fields) for _, fields in entries]
        records = self._client.hmget(self._keys.key("queued"), ordinals)
        started = time.monotonic()
        for (entry, fields), ordinal, record in zip(entries, ordinals, records, strict=True):
            if record is None or not record.startswith(entry + b" "):
                self._refuse(version, entry, ordinal, "was never admitted", counted=False)
                continue
            try:
                group = _decode(fields, f"{self._run}-{ordinal}")
                epoch, step = map(int, record.split()[1:3])
                if group.header.version != PolicyVersion(epoch=epoch, step=step):
                    raise CorruptGroup(
                        group.group_id, f"says version {group.header.version}, admitted as {epoch}.{step}"
                    )
            except CorruptGroup as error:
                self._refuse(version, entry, ordinal, error.reason, counted=True)
                continue
            self._taken[ordinal] = (entry, group)
        self.opening_s += time.monotonic() - started
        self._drop_stale(version)

    def _drop_stale(self, version: PolicyVersion) -> None:
        for ordinal, (entry, group) in list(self._taken.items()):
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


def _decode(fields: dict[bytes, bytes], group_id: str) -> Group:
    parts = [fields.get(name) for name in (b"header", b"payload", b"sha256")]
    header, payload, digest = parts
    if header is None or payload is None or digest is None:
        raise CorruptGroup(group_id, f"its entry has only the fields {sorted(fields)}")
    return decode_group(header, payload, digest.decode(errors="replace"), group_id=group_id)
