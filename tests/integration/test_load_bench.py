"""The load bench, small: every figure is there, and comes from groups that went through the queue."""

from __future__ import annotations

import pytest

from benchmarks.load import run_load_bench


@pytest.mark.slow
def test_it_measures_workers_that_take_turns() -> None:
    result = run_load_bench(workers=(4, 16), group_bytes=30_000, sample_s=0.02, seconds=2.0)
    for workers, found in result["workers"].items():
        assert 0 < found["groups_s"] <= found["offered_s"] * 1.1
        assert 0 < found["issue_p50_s"] <= found["issue_p99_s"]
        assert found["crowded_p99_s"] > 0
        assert 0 < found["fewest"] <= found["most"] and found["starved"] == 0
        assert 1 / int(workers) < found["jain"] <= 1
        assert 0 < found["outstanding"] <= found["window"]
        assert 0 <= found["waits"] < 1
    crowd = result["workers"]["16"]
    assert crowd["window"] < 16 and crowd["waits"] > 0
