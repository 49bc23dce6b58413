"""A seeded schedule of faults: whatever dies, the run goes on by itself and ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import Schedule, run_chaos_bench
from benchmarks.chaos_faults import FAULTS, SERVE
from services.config_file import ConfigError

SHORT = (
    *("worker-killed-sampling", "learner-killed-updating", "queue-wiped"),
    *("reward-wrong", "driver-killed"),
)


STEPS = 16


@pytest.mark.timeout(900)
def test_a_run_that_loses_its_parts_one_by_one_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Without held-out prompts, so that no evaluator has to start with each of its drivers."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f'a sign that says "{word}"' for word in ("OAK", "ELM", "ASH", "YEW")))
    result = run_chaos_bench(
        faults=SHORT,
        minutes=10,
        most=len(SHORT),
        steps=STEPS,
        seed=3,
        overrides=[f"prompts={{source: file, path: {prompts}}}"],
    )
    assert result["survived"], result
    assert result["equal"] and (result["lost"], result["repeated"], result["dead"]) == (0, 0, 0)
    assert {fault: found["times"] for fault, found in result["faults"].items()} == dict.fromkeys(SHORT, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fault_is_survived() -> None:
    result = run_chaos_bench(minutes=30, most=2 * len(FAULTS), seed=4)
    assert result["survived"], result
    assert result["equal"] and (result["lost"], result["repeated"], result["dead"]) == (0, 0, 0)
    assert set(result["faults"]) == set(FAULTS)


def test_a_schedule_follows_from_its_seed_and_leaves_no_fault_out() -> None:
    import random

    def drawn(seed: int) -> list[str]:
        schedule = Schedule(tuple(FAULTS), random.Random(seed), float("inf"), len(FAULTS))
        found = []
        while schedule.goes_on:
            found.append(schedule.next())
        return found

    assert drawn(1) == drawn(1) != drawn(2)
    assert sorted(drawn(1)) == sorted(FAULTS) and set(FAULTS) > SERVE


def test_an_unknown_fault_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown earthquake; valid: worker-killed, "):
        run_chaos_bench(faults=("earthquake",))
