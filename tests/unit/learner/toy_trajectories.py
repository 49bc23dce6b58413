"""Configs of any objective for the toy policy, and groups that a stochastic sampler went through."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from toy_policy import ToyPolicy, live_groups, toy_config, training_groups

from learner.objectives.base import LiveGroup, TrainingGroup
from policy.schedule import make_schedule
from policy.sde import DEFAULT_NOISE_LEVEL, log_likelihood, step_gaussian
from services.config import Config

AnyGroup = TypeVar("AnyGroup", LiveGroup, TrainingGroup)
TIMESTEPS = {"first": 3, "per_update": 2}


def objective_config(objective: dict[str, Any], **sections: Any) -> Config:
    """`toy_config` with another objective; flow_grpo's rollouts are stochastic."""
    if objective["name"] == "flow_grpo":
        sections["rollout"] = {"solver": "sde"} | sections.get("rollout", {})
    raw = toy_config(**sections).model_dump(mode="json")
    return Config.model_validate(raw | {"objective": {"timesteps": TIMESTEPS} | objective})


@torch.no_grad()
def with_trajectories(
    groups: list[AnyGroup],
    policy: ToyPolicy,
    config: Config,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[AnyGroup]:
    """The groups, each with a trajectory that the policy as it is now has drawn; the latents stay."""
    schedule, rollout = make_schedule(config.rollout), config.rollout
    level = rollout.noise_level or DEFAULT_NOISE_LEVEL
    negative = policy.negative() if rollout.guidance > 1 else None
    source = torch.Generator().manual_seed(seed)
    done = []
    for group in groups:
        shape = group.latents.shape
        points, likelihoods = [torch.randn(shape, generator=source).to(dtype)], []
        for index in range(len(schedule) - 1):
            speed = policy.velocity(
                points[-1],
                schedule.timesteps[index],
                group.condition,
                guidance=rollout.guidance,
                negative=negative,
            )
            mean, deviation = step_gaussian(schedule, index, points[-1], speed, level)
            points.append(mean + deviation * torch.randn(shape, generator=source).to(dtype))
            likelihoods.append(log_likelihood(points[-1], mean, deviation))
        trajectory, stacked = torch.stack(points, dim=1), torch.stack(likelihoods, dim=1)
        done.append(dataclasses.replace(group, trajectory=trajectory, log_likelihoods=stacked))
    return done


def sampled_live_groups(
    count: int, policy: ToyPolicy, config: Config, dtype: torch.dtype = torch.float64
) -> list[LiveGroup]:
    return with_trajectories(live_groups(count, dtype=dtype), policy, config, dtype=dtype)


def sampled_training_groups(
    policy: ToyPolicy, config: Config, count: int = 2, seed: int = 0
) -> list[TrainingGroup]:
    """As they come from a queue: float32, and a trajectory only where the objective needs one."""
    groups = training_groups(count, seed)
    if not config.objective.needs_trajectory:
        return groups
    dtype = next(iter(policy.trainable().values())).dtype
    return [
        dataclasses.replace(
            group,
            trajectory=None if group.trajectory is None else group.trajectory.float(),
            log_likelihoods=None if group.log_likelihoods is None else group.log_likelihoods.float(),
        )
        for group in with_trajectories(groups, policy, config, dtype=dtype, seed=seed)
    ]
