"""The soak bench, short: parts are seen from a tenth of the run to its end, and their loops do the work."""

from __future__ import annotations

import pytest

from benchmarks.soak import run_soak_bench


@pytest.mark.slow
def test_every_part_is_measured_from_early_on_to_the_end() -> None:
    result = run_soak_bench(groups=8000)
    assert set(result["parts"]) == {
        *("learner-0", "rollout-0", "rollout-1", "driver", "queue server", "data in the queue")
    }
    # Processes; the queue's data are too small to tell anything of so short a run.
    for name in ("learner-0", "rollout-0", "rollout-1", "driver"):
        part = result["parts"][name]
        assert part["early"] > 50e6
        assert part["growth"] < 0.2
