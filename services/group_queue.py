"""The group queue: ordinals to the rollout workers, whole groups to the learner, over Redis or Valkey.

Promises
- Every ordinal is trained at most once within the surviving lineage, across crashes of workers, learner and
  server; it is trained exactly once unless it lands, with a reason, among the dead letters.
- Ordinals are issued lowest first, and only while `outstanding < window` and `trained + outstanding < limit`:
  backpressure acts before work is spent.
- A group is admitted whole and once, is neither stale nor from the future nor from outside the lineage, and
  stays in the queue until the commit that records it as trained and publishes the next version.
- Each change of state is one Lua script (services/queue_scripts), on the server's clock, safe to send twice.
- Nothing here waits without a deadline; what was waited for is in the exception.

Queue keys are `{dgpo:RUN}:*`. Instead of one `:seen:<group_id>` a group there is the hash `:queued` and the
frontier of resolved ordinals: the same dedupe, in bounded space.

    worker                          learner
    issue -> Lease                  begin_epoch -> PolicyVersion
    renew ... admit -> Admitted     take -> groups, commit -> next PolicyVersion
    fail, release                   frontier -> into the checkpoint

The sides live in queue_worker, queue_learner (which reads through queue_intake) and queue_board; the way to
a server in queue_connection; turns on a card that parts share in queue_turn.
"""

from __future__ import annotations

from services.codec import CorruptGroup, EncodedGroup, Group, decode_group, encode_group
from services.queue_connection import QueueUnreachable, connect
from services.queue_learner import QueueLearner
from services.queue_turn import Turn
from services.queue_types import (
    Admitted,
    Failed,
    Fenced,
    Frontier,
    Lease,
    NotAssigned,
    QueueError,
    QueueStatus,
    QueueTimeout,
    RunEnded,
    RunState,
    StateLost,
    Stopped,
)

__all__ = [
    "Admitted",
    "CorruptGroup",
    "EncodedGroup",
    "Failed",
    "Fenced",
    "Frontier",
    "Group",
    "GroupQueue",
    "Lease",
    "NotAssigned",
    "QueueError",
    "QueueStatus",
    "QueueTimeout",
    "QueueUnreachable",
    "RunEnded",
    "RunState",
    "StateLost",
    "Stopped",
    "connect",
    "decode_group",
    "encode_group",
]


class GroupQueue(QueueLearner):
    """The queue of one run, for any of its processes: worker, learner, driver, observer.

    >>> queue = GroupQueue(connect(url, password), "demo", config.queue)  # doctest: +SKIP
    """

    def turn(self, part: str, lease_s: float) -> Turn:
        """The turn of a part on the card that the run's parts share."""
        return Turn(self._client, self._keys.key("turn"), part, lease_s)
