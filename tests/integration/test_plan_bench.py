"""The plan bench, small: a simulated cluster does what was planned."""

from __future__ import annotations

import pytest

from benchmarks.plan import run_plan_bench


@pytest.mark.slow
def test_a_simulated_cluster_takes_about_as_long_as_planned() -> None:
    result = run_plan_bench(
        gpus=[4],
        recipe="quickstart",
        overrides=["learner.groups_per_step=8"],
        updates=3,
        seconds_a_group=0.25,
    )
    assert [run["staleness"] for run in result["runs"]] == [1, 0]
    for run in result["runs"]:
        assert run["workers"] + run["ranks"] <= 4
        # A machine that is busy with other work makes it longer, never shorter by more than its jitter.
        assert -0.1 < run["error"] < 0.5
