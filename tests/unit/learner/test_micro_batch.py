"""`learner.micro_batch: auto` finds what fits, leaves no trace of its tries, and keeps to what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_of_threads import together
from torch import Tensor
from toy_policy import ToyPolicy, training_groups
from toy_trajectories import objective_config, sampled_training_groups

from learner import trainer as training
from learner.follower import begin_together, follow
from learner.micro_batch import MicroBatchFile
from learner.ranks import Order, Ranks
from learner.trainer import PolicyTrainer
from learner.update import UpdateError, Updater
from policy.base import Condition
from services.config import Config
from services.config_file import ConfigError
from services.context import RunContext
from services.heartbeat import Pulse

OBJECTIVES = ({"name": "dgpo", "kl": 0.1}, {"name": "diffusion_nft"}, {"name": "flow_grpo"})


class SmallDevice(ToyPolicy):
    """Has memory for so many samples at once, where they leave activations behind."""

    def __init__(self, limit: int) -> None:
        super().__init__(torch.float32)
        self.limit = limit
        self.sizes: list[int] = []

    def velocity(
        self, x: Tensor, timestep: Tensor, condition: Condition | Sequence[Condition], **more: Any
    ) -> Tensor:
        velocity = super().velocity(x, timestep, condition, **more)
        if velocity.requires_grad:
            self.sizes.append(len(x))
            if len(x) > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} samples")
        return velocity


def config_of(objective: dict[str, Any], micro_batch: int | str = "auto", **learner: Any) -> Config:
    return objective_config(objective, learner={"micro_batch": micro_batch} | learner)


def everything(updater: Updater) -> dict[str, Tensor]:
    return {f"{part}.{name}": t.clone() for part, held in updater.state().items() for name, t in held.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], t) for name, t in other.items())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective["name"])
@pytest.mark.parametrize("limit", [1, 2, 99])
def test_updates_are_those_of_the_size_that_fits(objective: dict[str, Any], limit: int) -> None:
    config, fits = config_of(objective), min(limit, 4)
    groups = sampled_training_groups(ToyPolicy(torch.float32), config)
    policy = SmallDevice(limit)
    updater = Updater(policy, config)
    dice = torch.get_rng_state()
    rows = [updater.step(groups, step).row() for step in range(2)]
    assert torch.equal(torch.get_rng_state(), dice)
    assert [row["micro_batch"] for row in rows] == [fits, fits]
    assert [size for size in policy.sizes if size > limit] == [size for size in (4, 2) if size > limit]
    expected = Updater(ToyPolicy(torch.float32), config_of(objective, fits))
    for step in range(2):
        expected.step(groups, step)
    assert equal(everything(updater), everything(expected))


def test_a_device_without_memory_for_one_sample_ends_the_run_unchanged() -> None:
    updater = Updater(SmallDevice(0), config_of(OBJECTIVES[0]))
    before = everything(updater)
    with pytest.raises(UpdateError, match=r"no memory for a single sample.*gradient_checkpointing"):
        updater.step(training_groups(2), 0)
    assert equal(everything(updater), before)
    assert all(parameter.grad is None for parameter in updater.policy.trainable().values())


@pytest.mark.parametrize(("known", "expected"), [(None, [1, 1]), (4, [4, 4])])
def test_ranks_agree_on_the_least(known: int | None, expected: list[int]) -> None:
    """Also one that has no share of the update, and none of them tries where a former learner has."""
    config = config_of(OBJECTIVES[0])
    made = [SmallDevice(limit) for limit in (2, 1)]
    group = training_groups(1)

    def body(ranks: Ranks) -> tuple[int | None, dict[str, Tensor]]:
        updater = Updater(made[ranks.rank], config, ranks)
        if known and not ranks.rank:
            updater.keep_to(known)
        begin_together(ranks, updater)
        if ranks.rank:
            follow(ranks, updater, Pulse("learner-1", lambda beat: None), beside_s=0, report=lambda: None)
        else:
            updater.step(group, 0)
            ranks.order_all(Order(do="end"))
        return updater.objective.micro_batch, everything(updater)

    if known:
        made[0].limit = made[1].limit = 99
    found = together(2, body)
    assert [one[0] for one in found if not isinstance(one, Exception)] == expected
    assert made[0].sizes == ([] if known else [4, 2, 2, 2, 2])


def test_a_run_keeps_to_what_it_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it crashed ahead of its first checkpoint, and goes on with more memory."""
    policies = [SmallDevice(2), SmallDevice(99), SmallDevice(99)]
    monkeypatch.setattr(training, "load_policy", lambda *_, **__: policies.pop(0))
    monkeypatch.setattr(training, "training_group", lambda group: group)
    config = config_of(OBJECTIVES[0])
    context = RunContext(run="test", directory=tmp_path, config=config, queue_url="redis://nowhere")
    ends = []
    for device in policies[:2]:
        trainer = PolicyTrainer(context, None)
        assert trainer.begin().step == 0
        rows = [trainer.update(training_groups(2), step) for step in range(2)]  # type: ignore[arg-type]
        assert [row["micro_batch"] for row in rows] == [2, 2]
        assert set(device.sizes) - {4} == {2}
        ends.append(everything(trainer.updater))
    assert equal(*ends)
    assert MicroBatchFile(tmp_path).read() == 2
    (tmp_path / "micro_batch.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"micro_batch\.json: unreadable"):
        PolicyTrainer(context, None).begin()
