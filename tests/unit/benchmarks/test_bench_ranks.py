"""The benchmark of ranks: real processes make the updates of one process."""

from __future__ import annotations

import pytest

from benchmarks.ranks import run_ranks_bench


@pytest.mark.slow
@pytest.mark.timeout(600)  # three processes import torch and diffusers
def test_two_processes_make_the_updates_of_one() -> None:
    small = ("rollout.group_size=4", "learner.groups_per_step=3", "learner.micro_batch=4")
    result = run_ranks_bench(counts=(1, 2), updates=3, overrides=small)
    one, two = result["ranks"]["1"], result["ranks"]["2"]
    assert (result["updates"], result["groups"]) == (2, 3)
    assert (one["difference"], one["waited_s"]) == (0.0, 0.0)
    assert 0 < two["difference"] < 1e-2
    assert two["waited_s"] > 0
