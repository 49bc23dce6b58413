"""The model side of the learner's loop: binds it to the real policy, update, policy store and checkpoints.

Promises
- What is published, written and restored is the whole model's, wherever it lies: on this rank, or in rows on
  all of them (learner.sharding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed
from torch import Tensor

from learner.checkpoint import Checkpoint, CheckpointError, newest_checkpoint, open_checkpoint, set_aside
from learner.checkpoint_writer import CheckpointWriter
from learner.curriculum import PART, curriculum_of
from learner.follower import begin_together, gather, order_comparison, probe_together, shard_together
from learner.loop import Start
from learner.micro_batch import MicroBatchFile
from learner.prober import Prober
from learner.ranks import Order, Ranks, together
from learner.sharded_checkpoint import ShardedCheckpointWriter, read_rows
from learner.update import TrainingGroup, Updater
from policy import load_policy
from policy.loading import find_device
from policy.one_order import add_up_in_one_order, wants_one_order
from services.codec import Group
from services.conditions import condition_cache
from services.context import RunContext
from services.group_queue import Frontier
from services.messages import PolicyVersion, WeightsAnnouncement
from services.policy_store import publish, publish_rows
from services.transports.base import WeightsTransport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHOWN_LATE_S = 10.0
"""Storage between nodes may show a new checkpoint some seconds late."""


class PolicyTrainer:
    """The real trainer of the loop (learner/loop.py `Trainer`)."""

    def __init__(self, context: RunContext, transport: WeightsTransport, ranks: Ranks | None = None) -> None:
        self._context = context
        self._transport = transport
        self._ranks = ranks
        self._config = config = context.config
        torch.set_num_threads(config.learner.threads)
        if wants_one_order(config, find_device(config.model.device)):
            add_up_in_one_order()
        self.sharded = config.learner.sharding == "fsdp"
        self.policy = load_policy(
            config.model,
            # Conditions travel with the groups; only guidance needs the empty prompt's as well.
            text_encoders=config.learner_guides,
            vae=False,
            base=config.objective.needs_base and not self.sharded,
            seed=config.run.seed,
            to_shard=self.sharded,
            condition_cache=condition_cache(config, context.directory),
        )
        self._kept = MicroBatchFile(context.directory) if config.learner.micro_batch == "auto" else None
        self.curriculum = curriculum_of(config)
        self._compared = -1
        if not self.sharded:
            self._prepare()

    def divide(self, mesh: DeviceMesh) -> None:
        """Of every rank whose weights are sharded, once all have loaded the model: keep its rows."""
        assert self._ranks is not None
        shard_together(self._ranks, self.policy, mesh, base=self._config.objective.needs_base)
        together(self._ranks, "the preparation of the learner", self._prepare)

    def _prepare(self) -> None:
        if self._config.learner_guides:
            # Now: text encoders that are loaded for it must not be in the way of a try of the micro-batch.
            self.policy.prepare((), negative=True)
        self.updater = Updater(self.policy, self._config, self._ranks)
        self._prober = Prober(self.policy, self._config)
        directory, settings = self._context.directory, self._config.checkpoint
        how: dict[str, Any] = {"keep": settings.keep, "asynchronous": settings.asynchronous}
        self.rows_writer: ShardedCheckpointWriter | None = None
        self._writer: CheckpointWriter | ShardedCheckpointWriter
        if self._ranks is not None and self.policy.shards is not None:
            self.rows_writer = ShardedCheckpointWriter(self._ranks, self.policy.shards, directory, **how)
            self._writer = self.rows_writer
        else:
            self._writer = CheckpointWriter(directory, **how)

    def begin(self) -> Start:
        """Load the newest complete checkpoint, if there is one; of several ranks on each of them, which then
        all go on from the same state.

        Raises:
            CheckpointsUnusable: there are checkpoints, and none is right.
            RanksDiffer: another rank has loaded another model.
        """
        ranks = self._ranks
        if ranks is not None and self.sharded:
            start = self._restore_rows(ranks)
        else:
            leads = ranks is None or ranks.rank == 0
            start = together(ranks, "the newest checkpoint", self._restore if leads else Start)
        if ranks is not None:
            begin_together(ranks, self.updater)
        return start

    def _restore(self) -> Start:
        known = None if self._kept is None else self._kept.read()
        if known is not None:
            self.updater.keep_to(known)
        found = newest_checkpoint(self._context.directory)
        if found is None:
            return Start()
        self.updater.load_state({part: found.state[part] for part in found.state if part != PART})
        return self._behind(found, set_aside(found))

    def _restore_rows(self, ranks: Ranks) -> Start:
        """Of every rank whose weights are sharded: the rows of the checkpoint that rank 0 has found."""
        shards, found, told = self.policy.shards, None, list[str]()
        assert shards is not None

        def find() -> bytes:
            nonlocal found
            found = newest_checkpoint(self._context.directory)
            if found is None:
                return b""
            told.extend(set_aside(found))
            return found.path.name.encode()

        leads = ranks.rank == 0
        name = ranks.exchange("the newest checkpoint", find if leads else bytes)[0].decode()
        if not name:
            return Start()

        def load() -> Checkpoint:
            # Rank 0 has verified it.
            checkpoint = found or _opened(self._context.directory / "checkpoints" / name)
            self.updater.load_state(read_rows(checkpoint, shards, self.updater.state()))
            return checkpoint

        return self._behind(together(ranks, f"the rows of the checkpoint {name}", load), told)

    def _behind(self, found: Checkpoint, passed_over: Sequence[str]) -> Start:
        if self.curriculum is not None:
            self.curriculum.load_state(found.state)
        return Start(
            version=PolicyVersion(epoch=found.manifest["epoch"], step=found.step),
            frontier=Frontier.model_validate(found.manifest["frontier"]),
            passed_over=tuple(passed_over),
        )

    def update(self, groups: Sequence[Group], step: int) -> dict[str, Any]:
        self._writer.check()
        row = self.updater.step([training_group(group) for group in groups], step).row()
        if self._kept is not None:
            self._kept.keep(row["micro_batch"])
        if (step + 1) % self._config.learner.compare_every == 0:
            self._compare(step + 1)
        return row

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        dtype = getattr(torch, self._config.learner.publish_dtype)
        tensors, shards = self.updater.published(kind, version.step), self.policy.shards
        if shards is None:
            probe = self._prober.of(tensors, version, kind=kind)
            return publish(self._transport, tensors, version, kind=kind, dtype=dtype, probe=probe)
        assert self._ranks is not None
        # Before the others send: it may wait for a worker.
        buffer = self._transport.reclaim(kind)
        due = self._prober.due(version, kind=kind)
        order = {"do": "gather", "kind": kind, "step": version.step, "probe": due}
        self._ranks.order_all(Order.model_validate(order))
        probe = probe_together(self._ranks, self.updater, kind, version.step) if due else None
        like = {name: torch.empty(shards.shapes[name], dtype=dtype, device="meta") for name in tensors}
        rows = self._rows(self._ranks, kind, version.step)
        return publish_rows(self._transport, like, rows, version, kind=kind, probe=probe, buffer=buffer)

    def _rows(self, ranks: Ranks, kind: str, step: int) -> Iterator[tuple[str, list[Tensor]]]:
        yield from gather(ranks, self.updater, kind, step)
        # Now and not when they are published: the others listen, whatever becomes of what they have sent.
        ranks.settled()

    def checkpoint(self, version: PolicyVersion, frontier: Frontier) -> None:
        self._compare(version.step)
        self._writer.write(
            version.step,
            self.updater.state() | ({PART: self.curriculum.state()} if self.curriculum is not None else {}),
            {"epoch": version.epoch, "frontier": frontier.model_dump(mode="json")},
        )

    def held(self) -> Iterator[Tensor]:
        """Every tensor that is kept from one update to the next."""
        yield from self.policy.held()
        yield from self.updater.trained.held()

    def finish(self) -> None:
        self._writer.finish()
        self._transport.close()

    def close(self) -> None:
        """The loop has ended, perhaps by an error."""
        self._writer.close()

    def _compare(self, step: int) -> None:
        if self._ranks is not None and self._compared != step:
            order_comparison(self._ranks, step, self.updater)
            self._compared = step


@retry(
    retry=retry_if_exception_type(CheckpointError),
    stop=stop_after_delay(SHOWN_LATE_S),
    wait=wait_fixed(0.5),
    reraise=True,
)
def _opened(place: Path) -> Checkpoint:
    return open_checkpoint(place)


def training_group(group: Group) -> TrainingGroup:
    header = group.header
    return TrainingGroup(
        ordinal=header.ordinal,
        latents=group.tensors["latents"],
        rewards=header.rewards,
        condition=_prefixed(group.tensors, "condition."),
        sampled_at=header.version.step,
        trajectory=group.tensors.get("trajectory"),
        log_likelihoods=group.tensors.get("log_likelihoods"),
    )


def _prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
