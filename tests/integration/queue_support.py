"""A small run to test the queue with: workers that make groups of zeros, a learner that trains nothing."""

from __future__ import annotations

from typing import Any

import torch

from services.codec import EncodedGroup, encode_group
from services.config import QueueConfig
from services.embedded import EmbeddedValkey
from services.group_queue import Admitted, Frontier, GroupQueue, Lease, connect
from services.messages import GroupHeader, PolicyVersion, Prompt, WeightsAnnouncement

GROUP_SIZE = 2


def version(epoch: int, step: int) -> PolicyVersion:
    return PolicyVersion(epoch=epoch, step=step)


def weights(at: PolicyVersion, kind: str = "policy") -> WeightsAnnouncement:
    return WeightsAnnouncement.model_validate(
        {"version": at, "kind": kind, "digest": f"digest of {at}", "tensors": 1, "bytes": 4}
    )


class Run:
    """One run on a real server; `queue()` is the client of one more process.

    Two groups a step, five steps, unless said otherwise.
    """

    def __init__(
        self, server: EmbeddedValkey, name: str, *, groups_per_step: int = 2, steps: int = 5, **config: Any
    ) -> None:
        self.server = server
        self.name = name
        self.config = QueueConfig(**{"max_staleness": 0, **config})
        self.groups_per_step = groups_per_step
        self.limit = steps * groups_per_step
        self.learner = self.queue()
        self.worker = self.queue()

    def queue(self, **changes: Any) -> GroupQueue:
        config = self.config.model_copy(update=changes)
        return GroupQueue(connect(self.server.url, self.server.password), self.name, config)

    def begin(
        self,
        learner: GroupQueue | None = None,
        checkpoint: PolicyVersion | None = None,
        frontier: Frontier | None = None,
        **changes: int,
    ) -> PolicyVersion:
        sizes = {
            "limit": self.limit,
            "window": (self.config.max_staleness + 1) * self.groups_per_step,
        }
        return (learner or self.learner).begin_epoch(
            weights, checkpoint=checkpoint, frontier=frontier, **(sizes | changes)
        )

    def group(
        self,
        lease: Lease | int,
        at: PolicyVersion | None = None,
        worker: str = "w0",
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> EncodedGroup:
        ordinal = lease if isinstance(lease, int) else lease.ordinal
        if at is None:
            assert isinstance(lease, Lease)
            at = lease.version
        header = GroupHeader(
            run=self.name,
            ordinal=ordinal,
            attempt=1,
            version=at,
            prompt=Prompt(text=f"prompt {ordinal}"),
            seeds=tuple(range(GROUP_SIZE)),
            rewards={"ocr": (0.0, 1.0)},
            worker=worker,
            sample_s=0.0,
            reward_s=0.0,
        )
        return encode_group(header, tensors or {"latents": torch.full((GROUP_SIZE, 4), float(ordinal))})

    def leases(self, worker: str = "w0", queue: GroupQueue | None = None) -> list[Lease]:
        """All that can be had now; the worker does not stand in line for more."""
        found = []
        while (lease := (queue or self.worker).issue(worker)) is not None:
            found.append(lease)
        self.learner._client.zrem(self.raw("line"), worker)
        return found

    def fill(self, worker: str = "w0") -> list[int]:
        """Make and admit every group that can be had now; returns their ordinals."""
        leases = self.leases(worker)
        for lease in leases:
            assert self.worker.admit(self.group(lease, worker=worker)) is Admitted.OK
        return [lease.ordinal for lease in leases]

    def step(self, learner: GroupQueue | None = None) -> list[int]:
        """One update: take, commit; returns the ordinals it trained."""
        learner = learner or self.learner
        ordinals = [group.header.ordinal for group in learner.take(self.groups_per_step, deadline_s=10)]
        self.commit(ordinals, learner)
        return ordinals

    def commit(self, ordinals: list[int], learner: GroupQueue | None = None) -> PolicyVersion:
        learner = learner or self.learner
        now = learner.status().version
        assert now is not None
        return learner.commit(weights(version(now.epoch, now.step + 1)), ordinals)

    def raw(self, name: str) -> str:
        return f"{{dgpo:{self.name}}}:{name}"
