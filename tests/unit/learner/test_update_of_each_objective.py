"""Whatever the objective, an update is the same pure function that can be stopped and continued exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_policy import SHAPE, ToyPolicy, training_groups
from toy_trajectories import objective_config, sampled_training_groups

from learner.ema import reference_decay
from learner.objectives.base import TrainingGroup
from learner.update import Updater
from rollout_workers.solvers import solve, solve_stochastic
from services.config import OBJECTIVES, Config, WithReference
from services.metrics import UpdateRow

ALL: list[dict[str, Any]] = [
    {"name": "dgpo", "beta": 50.0, "kl": 0.1, "reference_decay": 0.3, "reference_ramp": 0.1},
    {"name": "flow_grpo", "clip_range": 0.01, "kl": 0.1},
    {"name": "flow_grpo"},
    {"name": "diffusion_nft", "kl": 0.1, "reference_ramp": 0.1},
    {"name": "diffusion_nft", "reference_decay": 0.0},
]


def everything(updater: Updater) -> dict[str, Tensor]:
    return {
        f"{part}/{name}": tensor.clone()
        for part, tensors in updater.state().items()
        for name, tensor in tensors.items()
    }


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def updates(updater: Updater, steps: range) -> None:
    for step in steps:
        updater.step(sampled_training_groups(updater.policy, updater.config, seed=step), step)


def new_updater(config: Config, dtype: torch.dtype = torch.float32) -> Updater:
    return Updater(ToyPolicy(dtype), config)


def test_every_objective_is_here() -> None:
    assert {objective["name"] for objective in ALL} == set(OBJECTIVES)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_two_updates_move_the_weights_and_say_what_happened(objective: dict[str, Any]) -> None:
    config = objective_config(objective)
    updater = new_updater(config)
    before = everything(updater)
    for step in range(2):
        metrics = updater.step(sampled_training_groups(updater.policy, config, seed=step), step)
        row = metrics.row()
        checked = {**row, "time": 0.0, "epoch": 0, "step": step + 1, "max_steps": 5, "seconds": 1.0}
        UpdateRow.model_validate(checked)
        assert metrics.loss is not None and math.isfinite(metrics.loss)
        assert metrics.grad_norm is not None and metrics.grad_norm > 0
        assert (metrics.kl is not None) == (config.objective.kl > 0)
        # What an objective does not have is not a number.
        assert (metrics.group_weight is None) == (objective["name"] != "dgpo")
        assert (metrics.clip_fraction is None) == (objective["name"] == "diffusion_nft")
        assert (metrics.dsm is None) == (objective["name"] == "flow_grpo")
        after = everything(updater)
        assert all(not torch.equal(after[name], before[name]) for name in after if name.startswith("policy/"))
        before = after
    parts = {"policy", "ema", "optimizer"} | ({"reference"} if objective["name"] != "flow_grpo" else set())
    assert set(updater.state()) == parts


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_a_continuation_is_bit_identical(objective: dict[str, Any]) -> None:
    config = objective_config(objective, learner={"optimizer_steps": 2, "ema_every": 2, "micro_batch": 2})
    straight, resumed = new_updater(config), new_updater(config)
    updates(straight, range(3))
    state = {part: {n: t.clone() for n, t in tensors.items()} for part, tensors in straight.state().items()}
    resumed.load_state(state)
    updates(straight, range(3, 6))
    updates(resumed, range(3, 6))
    assert_equal(everything(resumed), everything(straight))


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_order_of_groups_changes_no_bit(objective: dict[str, Any]) -> None:
    config = objective_config(objective, learner={"optimizer_steps": 2, "micro_batch": 4})
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        updater = new_updater(config)
        for step in range(2):
            groups = sampled_training_groups(updater.policy, config, 3, seed=step)
            updater.step([groups[place] for place in order], step)
        results.append(everything(updater))
    assert_equal(*results)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_an_update_without_any_preference_leaves_the_weights(objective: dict[str, Any]) -> None:
    config = objective_config(objective)
    updater = new_updater(config)
    groups = sampled_training_groups(updater.policy, config)
    before = everything(updater)
    metrics = updater.step([dataclasses.replace(g, rewards={"ocr": [1.0] * 4}) for g in groups], 0)
    assert (metrics.zero_variance_groups, metrics.loss, metrics.grad_norm) == (2, None, None)
    after = everything(updater)
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("policy/"))


@pytest.mark.parametrize("switch_step", [None, 0, 2])
def test_rollouts_of_diffusion_nft_sample_with_the_old_policy(switch_step: int | None) -> None:
    objective = {"name": "diffusion_nft", "switch_step": switch_step, "reference_ramp": 0.2}
    config = objective_config(objective)
    assert isinstance(config.objective, WithReference)
    updater = new_updater(config, torch.float64)
    old = updater.policy.tensors()
    for step in range(4):
        expected = old if switch_step is not None and step >= switch_step else updater.policy.tensors()
        for name, tensor in updater.rollout_tensors(step).items():
            torch.testing.assert_close(tensor, expected[name])
        updates(updater, range(step, step + 1))
        decay = reference_decay(config.objective, step + 1)
        now = updater.policy.tensors()
        assert 0 < decay <= 0.5
        old = {name: decay * old[name] + (1 - decay) * now[name] for name in now}
        assert all(not torch.equal(old[name], now[name]) for name in now)


def test_rollouts_of_flow_grpo_sample_with_the_policy() -> None:
    updater = new_updater(objective_config({"name": "flow_grpo"}))
    updates(updater, range(2))
    now = updater.policy.tensors()
    assert all(torch.equal(tensor, now[name]) for name, tensor in updater.rollout_tensors(2).items())


def test_an_old_policy_that_is_the_policy_is_not_computed() -> None:
    for decay, forwards in ((0.0, [1, 1, 1]), (0.5, [1, 2, 2])):
        config = objective_config({"name": "diffusion_nft", "reference_decay": decay})
        policy = ToyPolicy(torch.float32)
        updater, counted = Updater(policy, config), []
        for step in range(3):
            policy.forwards = 0
            updater.step(training_groups(2, seed=step), step)
            counted.append(policy.forwards / (2 * 4 * 2))
        assert counted == forwards


@pytest.mark.parametrize("objective", ALL[2:4], ids=str)
def test_the_reward_rises(objective: dict[str, Any]) -> None:
    """Rollout, reward, update, again, with the real sampler of each objective."""
    config = objective_config(objective, rollout={"group_size": 8})
    policy = ToyPolicy(torch.float32)
    updater, condition = Updater(policy, config), training_groups(1)[0].condition
    rewards = []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return policy.velocity(x, timestep, condition)

    for step in range(15):
        groups = []
        for ordinal in (2 * step, 2 * step + 1):
            seeds = range(100 * ordinal, 100 * ordinal + 8)
            start = torch.stack(
                [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in seeds]
            )
            made: dict[str, Tensor] = {}
            with torch.no_grad(), policy.swapped(updater.rollout_tensors(step)):
                if config.objective.needs_trajectory:
                    latents, trajectory = solve_stochastic(config.rollout, velocity, start, seeds)
                    made = {
                        "trajectory": trajectory.points,
                        "log_likelihoods": trajectory.log_likelihoods,
                    }
                else:
                    latents = solve(config.rollout, velocity, start)
            reward = {"ocr": latents[:, 0].mean(dim=(1, 2)).tolist()}
            groups.append(TrainingGroup(ordinal, latents, reward, condition, **made))
        rewards.append(updater.step(groups, step).reward)
    first, last = (sum(one["mean"] for one in part) / 3 for part in (rewards[:3], rewards[-3:]))
    assert last - first > rewards[0]["std"]


@pytest.mark.parametrize("missing", ["trajectory", "log_likelihoods"])
def test_a_group_of_another_sampler_is_refused_by_its_ordinal(missing: str) -> None:
    config = objective_config({"name": "flow_grpo"})
    updater = new_updater(config)
    whole = sampled_training_groups(updater.policy, config, seed=0)
    steps = getattr(whole[1], missing).shape[1]
    for wrong, found in ((getattr(whole[1], missing)[:, :-1], str(steps - 1)), (None, "absent")):
        groups = [whole[0], dataclasses.replace(whole[1], **{missing: wrong})]
        with pytest.raises(ValueError, match=f"group {groups[1].ordinal}: {missing} are .*{found}"):
            updater.step(groups, 0)
