"""What an update reports of rewards that it was trained without."""

from __future__ import annotations

import dataclasses

from toy_policy import ToyPolicy, toy_config, training_groups

from learner.update import Updater


def test_a_term_that_a_group_lacks_is_counted() -> None:
    config = toy_config(objective={"timesteps": {"first": 3, "per_update": 2}})
    optional = config.rewards[0].model_copy(update={"name": "taste", "required": False})
    config = config.model_copy(update={"rewards": (*config.rewards, optional)})
    lacking, whole = training_groups(2)
    whole = dataclasses.replace(whole, rewards={**whole.rewards, "taste": [0.0, 1.0, 2.0, 3.0]})
    metrics = Updater(ToyPolicy(), config).step([lacking, whole], 0)
    assert metrics.row()["dropped_terms"] == {"taste": 1}
