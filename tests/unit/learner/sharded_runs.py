"""A real trainer on ranks that share the weights of the quickstart's model: what it publishes and writes.

Every scenario is a body of tests/ranks_of_processes.py `each_of`; what it finds is left in the folder.
"""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learner import ranks as transport
from learner import sharded_checkpoint
from learner.follower import follow
from learner.gathering import gathered
from learner.loop import Start
from learner.objectives.base import TrainingGroup
from learner.optimizer import STEPS
from learner.ranks import Order
from learner.trainer import PolicyTrainer
from services.config_file import load_config
from services.context import RunContext
from services.group_queue import Frontier
from services.heartbeat import Pulse
from services.messages import PolicyVersion
from services.transports.base import Reused
from tests.ranks_of_processes import mesh_of, ranks_of

GROUPS, SIZE = 3, 2
SETTINGS = (
    *("prompts.source=words", "rollout.group_size=2", f"learner.groups_per_step={GROUPS}"),
    *("learner.micro_batch=1", "learner.optimizer_steps=1", "objective.timesteps.per_update=1"),
    "learner.warmup_steps=1",
)
SHAPE = (4, 8, 16)
BUCKET_BYTES = 2**18
FILE_BYTES = 2**20
"""Small enough that the model is many of them."""


class Shelf(Reused):
    """What was published (services/transports `WeightsTransport`)."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[Any, Any]] = []

    def send(self, announcement: Any, payload: Any) -> None:
        self.sent.append((announcement, payload.copy()))
        self._copied(announcement.kind, payload)

    def receive(self, announcement: Any) -> Any:
        return None

    def close(self) -> None:
        """It is looked at afterwards."""


def trainer_of(run: Path, group: Any, *overrides: str) -> PolicyTrainer:
    """On this rank; None as the group: of one rank, whose weights are whole, as those of LoRA always are."""
    ranks = None if group is None else ranks_of(group)
    sharing = [] if group is None else [f"learner.ranks={group.size()}"]
    if group is not None and "model.train=lora" not in overrides:
        sharing.append("learner.sharding=fsdp")
    config = load_config("quickstart", [*SETTINGS, *sharing, *overrides])
    context = RunContext(run="test", directory=run, config=config, queue_url="redis://nowhere")
    trainer = PolicyTrainer(context, Shelf(), ranks)
    if trainer.sharded:
        trainer.divide(mesh_of(group))
    return trainer


def groups_of(trainer: PolicyTrainer, step: int) -> list[TrainingGroup]:
    made = torch.Generator().manual_seed(step)
    condition = {
        name: torch.randn((1, width) if name == "prompt_embeds" else (width,), generator=made)
        for name, width in type(trainer.policy).condition_widths(trainer.policy._configs.denoiser).items()
    }
    return [
        TrainingGroup(
            ordinal=place,
            latents=torch.randn((SIZE, *SHAPE), generator=made),
            rewards={"ocr": [0.0, 1.0]},
            condition=condition,
        )
        for place in range(GROUPS)
    ]


def train(trainer: PolicyTrainer, steps: range) -> list[float | None]:
    return [trainer.updater.step(groups_of(trainer, step), step).loss for step in steps]


def version(step: int) -> PolicyVersion:
    return PolicyVersion(epoch=0, step=step)


def state_of(trainer: PolicyTrainer) -> dict[str, Tensor]:
    """Whole; of several ranks on rank 0."""
    shards, ranks, found = trainer.policy.shards, trainer._ranks, {}
    for part, held in trainer.updater.state().items():
        for prefix in ("", "exp_avg.", "exp_avg_sq."):
            rows = {
                name: held[prefix + name]
                for name in trainer.updater.trained.parameters
                if prefix + name in held
            }
            if rows and shards is not None and ranks is not None:
                for name, pieces in gathered(ranks, "a test", shards, rows, torch.float32):
                    found[f"{part}.{prefix}{name}"] = torch.cat(pieces)
            else:
                found |= {f"{part}.{prefix}{name}": tensor.clone() for name, tensor in rows.items()}
        if STEPS in held:
            found[f"{part}.{STEPS}"] = held[STEPS]
    return found


def led(trainer: PolicyTrainer, lead: Callable[[], object]) -> Start:
    """Rank 0 leads, the others follow, from where the run directory says."""
    ranks, start = trainer._ranks, trainer.begin()
    if ranks is None:
        lead()
    elif ranks.rank:
        pulse = Pulse("", lambda beat: None)
        follow(ranks, trainer.updater, pulse, beside_s=0, report=lambda: None, writer=trainer.rows_writer)
    else:
        lead()
        ranks.order_all(Order(do="end"))
    return start


class Allocated(TorchDispatchMode):
    """Bytes of tensors that were made inside and are still there; the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = call(*args, **(kwargs or {}))
        inputs = {one.untyped_storage()._cdata for one in args if isinstance(one, Tensor)}
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor) and one.device.type == "cpu":
                self._note(one.untyped_storage(), inputs)
        return made

    def _note(self, storage: Any, inputs: set[int]) -> None:
        if storage._cdata in inputs or storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, which: int, size: int) -> None:
        self._seen.discard(which)
        self.now -= size


def publishes_and_writes(folder: Path, rank: int) -> None:
    """On two ranks of four: the model as it is, two updates, what is published, a checkpoint of each kind."""
    transport.BUCKET_BYTES, sharded_checkpoint.FILE_BYTES = BUCKET_BYTES, FILE_BYTES
    pair, _ = dist.new_group([0, 1]), dist.new_group([2, 3])
    if rank < 2:
        _on_two(folder, pair)
    dist.barrier()
    _resumes(folder, "run", dist.group.WORLD, "on-4")
    # The single rank's checkpoint, which is there from the start.
    _resumes(folder, "single", dist.group.WORLD, "single-on-4")


def _on_two(folder: Path, pair: Any) -> None:
    settings = ("checkpoint.keep=5", "checkpoint.asynchronous=true", "learner.probe_every=5")
    trainer = trainer_of(folder / "run", pair, *settings)
    found: dict[str, Any] = {}

    def lead() -> None:
        found["start"] = trainer.publish(version(0), kind="policy")
        found["losses"] = train(trainer, range(2))
        tracemalloc.start()
        with Allocated() as allocated:
            found["policy"] = trainer.publish(version(2), kind="policy")
        found["buffers"], found["tensors"] = tracemalloc.get_traced_memory()[1], allocated.most
        tracemalloc.stop()
        found["ema"] = trainer.publish(version(2), kind="ema")
        found["payloads"] = [torch.from_numpy(payload) for _, payload in trainer._transport.sent]
        trainer.checkpoint(version(2), Frontier(below=6))
        found["losses"] += train(trainer, range(2, 3))
        trainer._writer.check()
        found["losses"] += train(trainer, range(3, 4))
        trainer.finish()

    led(trainer, lead)
    found["state"] = state_of(trainer)
    trainer.close()
    if trainer._ranks is not None and trainer._ranks.rank == 0:
        torch.save(found, folder / "on-2.pt")
    # Another number of updates from the same files, for less memory, and a checkpoint that is waited for.
    saving = ("learner.publish_dtype=bfloat16", "learner.gradient_checkpointing=true")
    again = trainer_of(folder / "run", pair, *saving)
    start = again.begin()
    half: dict[str, Any] = {"start": start, "losses": []}

    def lead_again() -> None:
        half["loaded"] = again.publish(version(2), kind="policy")
        half["losses"] = train(again, range(2, 4))
        again.checkpoint(version(4), Frontier(below=12))

    led(again, lead_again)
    half["state"] = state_of(again)
    if again._ranks is not None and again._ranks.rank == 0:
        torch.save(half, folder / "again-on-2.pt")


def _resumes(folder: Path, run: str, group: Any, name: str) -> None:
    trainer = trainer_of(folder / run, group, "learner.groups_per_step=4")
    start = trainer.begin()
    state = state_of(trainer)
    if dist.get_rank() == 0:
        torch.save({"start": start, "state": state}, folder / f"{name}.pt")
