"""What everyone may read and say about a run: status, state, heartbeats, announced weights, metrics.

Promises
- Everything here is bounded: announcements to 16, metrics to about 512 rows, which the driver moves into the
  run directory, heartbeats by a time to live.
- Reads change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from services.messages import DeadLetter, Heartbeat, PolicyVersion, WeightsAnnouncement
from services.queue_types import Frontier, HeldLease, QueueStatus, RunState
from services.queue_worker import QueueWorker

METRICS_ROWS = 512
HEARTBEAT_TTL_S = 15.0


class QueueBoard(QueueWorker):
    """The parts of the queue that are for reading, and for saying how one is."""

    def status(self) -> QueueStatus:
        """One consistent look."""
        fields, scores, records, queued, again_count, again, dead, now, waiting, called = self._scripts.run(
            "status"
        )
        policy = dict(zip(map(bytes.decode, fields[::2]), map(bytes.decode, fields[1::2]), strict=True))
        expiries = dict(zip(scores[::2], scores[1::2], strict=True))
        leases = [
            _held(ordinal, record.decode(), float(expiries[ordinal]), int(now))
            for ordinal, record in zip(records[::2], records[1::2], strict=True)
        ]

        def number(name: str) -> int:
            return int(policy.get(name, 0))

        return QueueStatus(
            state=_state(policy.get("state")),
            reason=policy.get("reason", ""),
            version=PolicyVersion(epoch=number("epoch"), step=number("step")) if "epoch" in policy else None,
            depth=len(queued),
            bytes=number("bytes"),
            queued=tuple(sorted(map(int, queued))),
            leases=tuple(sorted(leases, key=lambda lease: lease.ordinal)),
            issuable=tuple(map(int, again)),
            issuable_count=int(again_count),
            next=number("next"),
            trained=number("trained"),
            dead=int(dead),
            window=number("window"),
            limit=number("limit"),
            waiting=int(waiting),
            called=tuple(name.decode() for name in called),
        )

    def frontier(self) -> Frontier:
        """Which ordinals are resolved now."""
        return frontier_of(self._scripts.run("frontier"))

    def dead_letters(self) -> list[DeadLetter]:
        """The ordinals that were given up, oldest first, with their reasons."""
        return [
            DeadLetter(
                ordinal=int(fields[b"ordinal"]),
                attempts=int(fields[b"attempts"]),
                reason=fields[b"reason"].decode(errors="replace"),
            )
            for _, fields in self._client.xrange(self._keys.key("dead"))
        ]

    def set_state(self, state: RunState, reason: str = "") -> None:
        """Say what state the run is in. draining, failed and done end the issuing of ordinals."""
        if state not in get_args(RunState):
            raise ValueError(f"run state {state!r} is none of {', '.join(get_args(RunState))}")
        self._scripts.run("set_state", state, reason)

    def state(self) -> RunState | None:
        """None before anybody said."""
        found = self._client.hget(self._keys.key("policy"), "state")
        return _state(found.decode() if found is not None else None)

    def want_workers(self, count: int) -> None:
        """Say how many rollout workers the run should have; those with a higher index end by themselves."""
        self._client.hset(self._keys.key("policy"), "workers", count)

    def wanted_workers(self) -> int | None:
        """None before anybody said."""
        found = self._client.hget(self._keys.key("policy"), "workers")
        return int(found) if found is not None else None

    def want_replicas(self, reward: str, count: int | None) -> None:
        """Say how many replicas a reward of the run should have that its driver has started; None: as many as
        the configuration says."""
        field = f"replicas:{reward}"
        if count is None:
            self._client.hdel(self._keys.key("policy"), field)
        else:
            self._client.hset(self._keys.key("policy"), field, count)

    def wanted_replicas(self, rewards: Sequence[str]) -> dict[str, int]:
        """Of these rewards, those of which somebody has said so."""
        if not rewards:
            return {}
        found = self._client.hmget(self._keys.key("policy"), [f"replicas:{reward}" for reward in rewards])
        return {reward: int(count) for reward, count in zip(rewards, found, strict=True) if count is not None}

    def beat(self, heartbeat: Heartbeat, ttl_s: float = HEARTBEAT_TTL_S) -> None:
        """Say that a part is alive; forgotten after `ttl_s`."""
        pipeline = self._client.pipeline(transaction=False)
        key = self._keys.key(f"hb:{heartbeat.part}")
        pipeline.set(key, heartbeat.model_dump_json(), px=max(1, int(ttl_s * 1000)))
        pipeline.sadd(self._keys.key("parts"), heartbeat.part)
        pipeline.execute()

    def forget(self, part: str) -> None:
        """A part that has been taken away is no silent one."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.srem(self._keys.key("parts"), part)
        pipeline.unlink(self._keys.key(f"hb:{part}"))
        pipeline.execute()

    def heartbeats(self) -> dict[str, Heartbeat | None]:
        """Last heartbeat of every part that ever beat; None for one that has fallen silent."""
        parts = sorted(part.decode() for part in self._client.smembers(self._keys.key("parts")))
        found = self._client.mget([self._keys.key(f"hb:{part}") for part in parts]) if parts else []
        return {
            part: Heartbeat.model_validate_json(text) if text is not None else None
            for part, text in zip(parts, found, strict=True)
        }

    def latest(self, kind: str = "policy") -> WeightsAnnouncement | None:
        """The newest announced weights of a kind."""
        found = self._client.hget(self._keys.key("latest"), kind)
        return WeightsAnnouncement.model_validate_json(found) if found is not None else None

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One row for whoever watches the run; the durable record is metrics.jsonl in the run directory."""
        text = json.dumps(row, allow_nan=True)
        self._client.xadd(self._keys.key("metrics"), {"row": text}, maxlen=METRICS_ROWS, approximate=True)

    def read_metrics(self, after_id: str = "0-0", count: int = 256) -> list[tuple[str, dict[str, Any]]]:
        """Rows since an id, oldest first; the ids to go on from."""
        answer = self._client.xread({self._keys.key("metrics"): after_id}, count=count)
        entries = answer[0][1] if answer else []
        return [(entry.decode(), json.loads(fields[b"row"])) for entry, fields in entries]

    def metrics_written(self, row_id: str) -> None:
        """Rows up to this one are in the run directory. Kept where the rows are: lost together, if at all."""
        self._client.hset(self._keys.key("policy"), "metrics_written", row_id)

    def last_written_metrics(self) -> str:
        """The id to go on from; that of no row when none was written."""
        found = self._client.hget(self._keys.key("policy"), "metrics_written")
        return found.decode() if found is not None else "0-0"


def _state(text: str | None) -> RunState | None:
    for state in get_args(RunState):
        if state == text:
            known: RunState = state
            return known
    return None


def _held(ordinal: bytes, record: str, expires_ms: float, now_ms: int) -> HeldLease:
    attempt, epoch, step, issued_ms, worker = record.split(" ", 4)
    return HeldLease(
        ordinal=int(ordinal),
        worker=worker,
        attempt=int(attempt),
        version=PolicyVersion(epoch=int(epoch), step=int(step)),
        age_s=(now_ms - int(issued_ms)) / 1000,
        expires_in_s=(expires_ms - now_ms) / 1000,
    )


def frontier_of(answer: Sequence[Any]) -> Frontier:
    """What the script of that name says."""
    _, below, above, dead = answer
    return Frontier.of(int(below), map(int, above), map(int, dead))
