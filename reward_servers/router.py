"""Which replica of a reward a request goes to: the one with the fewest requests, in turn among equals.

For Serve, which pickles this class whole and gives it to its proxies: they need not have this package. (Its
controller must, where a Serve config file overrides a deployment without naming this class.)

A group comes in several requests at once, or several groups do. Serve's own router gives replicas beside the
proxy all they take, which is more than there ever is here, before those of other nodes get any; of several it
takes the less busy of two random ones, so that two requests often meet while a third replica is idle. Its
round robin gives every replica as much, however slow it is (`dgpo reward bench division`).
"""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica


class FewestRequests(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Counts what goes through its own proxy or handle, each of which has one."""

    UNDERWAY_S = 1.0
    """A request that has been given a replica counts there for so long, before it is sent."""

    def initialize_state(self, **_: Any) -> None:
        # Proxies that do not know of each other begin in different places.
        self._turn = random.getrandbits(16)
        self._sent: Counter[ReplicaID] = Counter()
        self._underway: dict[ReplicaID, list[float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All of them, the best first: the next is asked if one takes no more."""
        if pending_request is not None:
            # Where none takes any more, Serve waits before it asks again.
            pending_request.routing_context.should_backoff = True
        if not candidate_replicas:
            return []
        self._turn += 1
        first = self._turn % len(candidate_replicas)
        turned = candidate_replicas[first:] + candidate_replicas[:first]
        now = time.monotonic()
        ranked = sorted(turned, key=lambda replica: self._requests(replica.replica_id, now))
        self._underway.setdefault(ranked[0].replica_id, []).append(now)
        return [[replica] for replica in ranked]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._sent[replica_id] += 1
        if underway := self._underway.get(replica_id):
            underway.pop(0)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        # One that was not listed for a while has been forgotten, with what it had.
        if self._sent[replica_id]:
            self._sent[replica_id] -= 1

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        self._sent = Counter({one: count for one, count in self._sent.items() if one in there})
        self._underway = {one: since for one, since in self._underway.items() if one in there}

    def _requests(self, replica: ReplicaID, now: float) -> int:
        underway = self._underway.get(replica, [])
        while underway and now - underway[0] > self.UNDERWAY_S:
            underway.pop(0)
        return self._sent[replica] + len(underway)
