"""Rollout, reward, update, again: the reward goes up, through the real policy, solver and objective."""

from __future__ import annotations

from typing import Any

import pytest
from toy_policy import toy_config

from learner.objectives.base import TrainingGroup
from learner.update import Updater
from policy import load_policy
from rollout_workers.sampling import sample
from services.config import LoraConfig, ModelConfig

UPDATES, GROUPS, SIZE = 8, 2, 8
PAPER = {"reference": "ema", "reference_decay": 0.0, "clip_range": 0.05}


@pytest.mark.parametrize(
    ("train", "objective"),
    [
        ("full", PAPER),
        ("full", {"reference": "frozen", "clip_range": None, "kl": 1e-3}),
        ("lora", PAPER),
    ],
)
def test_latents_move_where_the_reward_points(
    model_config: ModelConfig, train: str, objective: dict[str, Any]
) -> None:
    config = toy_config(
        model=model_config.model_copy(
            update={"train": train, "lora": LoraConfig(rank=8, alpha=16)}
        ).model_dump(),
        rollout={"group_size": SIZE, "steps": 4},
        objective={"beta": 50.0, "timesteps": {"first": 3, "per_update": 2}, **objective},
        learner={
            "micro_batch": SIZE,
            "learning_rate": 0.01 if train == "lora" else 3e-3,
            "optimizer_steps": 2,
        },
    )
    policy = load_policy(config.model, text_encoders=True, vae=False)
    condition = policy.encode('a sign that says "K7QX"')
    updater = Updater(policy, config)
    rewards = []
    for step in range(UPDATES):
        groups = []
        for ordinal in range(step * GROUPS, (step + 1) * GROUPS):
            seeds = range(1000 * ordinal, 1000 * ordinal + SIZE)
            latents = sample(policy, condition, None, seeds, config.rollout)
            reward = latents[:, 0].mean(dim=(1, 2)).tolist()
            groups.append(TrainingGroup(ordinal, latents, {"ocr": reward}, condition))
        rewards.append(updater.step(groups, step).reward)
    first, last = (sum(r["mean"] for r in part) / 2 for part in (rewards[:2], rewards[-2:]))
    assert last - first > 3 * rewards[0]["std"]
