"""Ranks that share the weights make the updates of one rank that has them all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from toy_policy import ToyPolicy, training_groups
from toy_trajectories import objective_config, with_trajectories

from learner.follower import begin_together, follow, order_comparison
from learner.objectives.base import TrainingGroup
from learner.ranks import Order, RankLost, Ranks
from learner.update import UpdateMetrics, Updater
from services.config import Config
from services.heartbeat import Pulse
from tests.ranks_of_processes import each_of, mesh_of, ranks_of

STEPS = 5
CASES: dict[str, dict[str, Any]] = {
    "whole groups": {},
    "two groups at once": {"learner": {"micro_batch": 8}},
    "weight first": {"learner": {"micro_batch": 2}, "objective": {"clip_range": 1e-3}},
    "offloaded": {"learner": {"micro_batch": 2, "activation_offload": True}},
    "kl, two optimizer steps": {
        "objective": {"kl": 0.1, "clip_range": 1e-3, "reference_ramp": 0.1},
        "learner": {"optimizer_steps": 2, "micro_batch": 2},
    },
    "kl, frozen, offloaded": {
        "objective": {"reference": "frozen", "kl": 0.1},
        "learner": {"micro_batch": 2, "activation_offload": True},
    },
    "reference of the rollout": {
        "objective": {"reference_of": "rollout", "clip_range": 1e-3},
        "queue": {"max_staleness": 2},
    },
    "diffusion_nft": {"objective": {"name": "diffusion_nft", "kl": 0.1}, "learner": {"micro_batch": 2}},
    "flow_grpo": {"objective": {"name": "flow_grpo", "kl": 0.1}},
}
ON_TWO = ("weight first", "kl, two optimizer steps", "reference of the rollout")
ON_FOUR = (*ON_TWO, "two groups at once", "offloaded")
FIELDS = ("loss", "dsm", "group_weight", "group_score", "clip_fraction", "kl", "grad_norm")
Made = tuple[list[UpdateMetrics], dict[str, Tensor]]


def config_of(case: str, ranks: int) -> Config:
    sections = {name: dict(values) for name, values in CASES[case].items()}
    objective = {"name": "dgpo"} | sections.pop("objective", {})
    if objective["name"] == "dgpo":
        objective = {"beta": 5.0, "clip_range": None} | objective
    learner = {"groups_per_step": 5, "micro_batch": 4, "max_grad_norm": 0.05} | sections.pop("learner", {})
    learner |= {"ranks": ranks, "sharding": "fsdp"} if ranks > 1 else {}
    return objective_config(objective, learner=learner, model={"train": "full"}, **sections)


def groups_of(config: Config, step: int) -> list[TrainingGroup]:
    """Five groups of one step; fewer and fewer of them have a preference, in the last step none."""
    flat = {0: (), 1: (3,), 2: (0, 2, 4), 3: (0, 1, 2, 4), 4: (0, 1, 2, 3, 4)}[step]
    groups = [
        dataclasses.replace(
            group,
            sampled_at=max(0, step - place % 3),
            rewards={"ocr": [0.5] * 4} if place in flat else group.rewards,
        )
        for place, group in enumerate(training_groups(5, seed=step))
    ]
    return with_trajectories(groups, ToyPolicy(), config) if config.objective.needs_trajectory else groups


def alone(case: str) -> Made:
    config = config_of(case, 1)
    updater = Updater(ToyPolicy(), config)
    made = [updater.step(groups_of(config, step), step) for step in range(STEPS)]
    state = updater.state()
    return made, {f"{part}.{name}": tensor for part, held in state.items() for name, tensor in held.items()}


def whole(updater: Updater) -> dict[str, Tensor]:
    """The state of all ranks, on each."""
    shards = updater.policy.shards
    assert shards is not None
    found = {}
    for part, held in updater.state().items():
        for name, rows in held.items():
            tensor = name.removeprefix("exp_avg_sq.").removeprefix("exp_avg.")
            found[f"{part}.{name}"] = (
                shards.whole(tensor, rows).full_tensor() if tensor in shards.shapes else rows
            )
    return found


def lead_or_follow(ranks: Ranks, updater: Updater) -> list[UpdateMetrics]:
    begin_together(ranks, updater)
    if ranks.rank:
        assert follow(ranks, updater, Pulse("", lambda beat: None), beside_s=0, report=lambda: None) is None
        return []
    made = [updater.step(groups_of(updater.config, step), step) for step in range(STEPS)]
    order_comparison(ranks, STEPS, updater)
    ranks.order_all(Order(do="end"))
    return made


def shared(case: str, group: Any) -> Made:
    config, policy = config_of(case, group.size()), ToyPolicy()
    policy.shard(mesh_of(group))
    ranks = ranks_of(group)
    updater = Updater(policy, config, ranks)
    if group.size() == 2:
        # 3 of 5 rows, 1 of 2: rank 0 has the larger halves.
        wanted = (
            {"inner": 6, "outer": 5, "time": 3, "text": 9}
            if ranks.rank == 0
            else {"inner": 4, "outer": 5, "time": 2, "text": 6}
        )
        for held in (updater.state()["policy"], updater.state()["ema"]):
            assert {name: tensor.numel() for name, tensor in held.items()} == wanted
    made = lead_or_follow(ranks, updater)
    return made, whole(updater)


def body(cases: tuple[str, ...], folder: Path, rank: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for case in cases:
        # Two ranks do nothing that four do not: some of the cases are enough.
        groups = [dist.group.WORLD, pairs[rank // 2]] if case in ON_TWO else [dist.group.WORLD]
        for group in groups:
            made, state = shared(case, group)
            if rank == 0:
                torch.save((made, state), folder / f"{case}-{group.size()}.pt")
    one_is_lost(folder)


def one_is_lost(folder: Path) -> None:
    """Of four ranks the last one ends in the middle of its share."""
    config, policy, group = config_of("whole groups", 4), ToyPolicy(), dist.group.WORLD
    policy.shard(mesh_of(group))
    ranks = ranks_of(group)
    updater = Updater(policy, config, ranks)
    if ranks.rank == 3:
        updater.objective.backward = lambda loss: os._exit(0)  # type: ignore[method-assign]
    try:
        lead_or_follow(ranks, updater)
    except RankLost as error:
        (folder / f"lost-{ranks.rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where four processes have left what they made of a case; they are started once for many."""

    @cache
    def of(cases: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        each_of(4, partial(body, cases), folder)
        return folder

    others = tuple(case for case in CASES if case not in ON_FOUR)
    return lambda case: of(ON_FOUR if case in ON_FOUR else others)


@pytest.mark.parametrize(
    ("case", "count"),
    [
        *((case, 2) for case in ON_TWO),
        *((case, 4) for case in ON_FOUR),
        *(pytest.param(case, 4, marks=pytest.mark.slow) for case in CASES if case not in ON_FOUR),
    ],
)
def test_five_updates_are_those_of_one_rank(case: str, count: int, found: Callable[[str], Path]) -> None:
    """In float64, with a gradient that is clipped, and shares that become smaller and empty."""
    expected, state = alone(case)
    made, weights = torch.load(found(case) / f"{case}-{count}.pt", weights_only=False)
    for ours, theirs in zip(made, expected, strict=True):
        for field in FIELDS:
            wanted = getattr(theirs, field)
            assert getattr(ours, field) == (
                wanted if wanted is None else pytest.approx(wanted, rel=1e-6, abs=1e-6)
            ), field
    assert weights.keys() == state.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-9, atol=1e-12)


def test_a_rank_that_is_gone_in_the_middle_of_a_pass_is_missed_by_name(found: Callable[[str], Path]) -> None:
    for rank, others in enumerate(("1, 2, 3", "0, 2, 3", "0, 1, 3")):
        told = (found(ON_FOUR[0]) / f"lost-{rank}.txt").read_text()
        assert f"for the gradient of update 0 from ranks {others}: " in told
