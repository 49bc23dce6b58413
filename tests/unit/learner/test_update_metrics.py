"""What an update reports of its rewards, and of those that it was trained without."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy_policy import ToyPolicy, toy_config, training_groups

from learner.update import Updater
from learner.update_metrics import spread


def test_a_term_that_a_group_lacks_is_counted() -> None:
    config = toy_config(objective={"timesteps": {"first": 3, "per_update": 2}})
    optional = config.rewards[0].model_copy(update={"name": "taste", "required": False})
    config = config.model_copy(update={"rewards": (*config.rewards, optional)})
    lacking, whole = training_groups(2)
    whole = dataclasses.replace(whole, rewards={**whole.rewards, "taste": [0.0, 1.0, 2.0, 3.0]})
    metrics = Updater(ToyPolicy(), config).step([lacking, whole], 0)
    assert metrics.row()["dropped_terms"] == {"taste": 1}


def test_the_spread_of_a_reward() -> None:
    """Quantiles are over all samples, the standard deviation is within the groups."""
    told = spread([torch.arange(0.0, 6.0), torch.arange(5.0, 11.0)])
    assert told == pytest.approx(
        {"mean": 5.0, "std": (35 / 12) ** 0.5, "p10": 1.1, "p50": 5.0, "p90": 8.9}, abs=1e-12
    )
