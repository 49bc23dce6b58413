"""What a run reserves of Ray."""

from __future__ import annotations

import pytest

from services.config_file import load_config
from services.ray_runtime import cpus_needed


def test_every_part_that_reserves_cpus_is_counted() -> None:
    base = cpus_needed(load_config("quickstart"))
    for key, more in (
        ("learner.num_cpus=2.5", 2.0),
        ("rollout.num_cpus=1.25", 2.0),
        ("rewards.0.num_cpus=2.1", 2.0),
        ("eval.num_cpus=2", 2.0),
    ):
        assert cpus_needed(load_config("quickstart", [key])) == pytest.approx(base + more), key
