"""What a run tells Ray for Prometheus. Against a real Prometheus: tests/integration/test_prometheus.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from services import ray_metrics
from services.config_file import PROJECT_ROOT
from services.messages import Heartbeat, PolicyVersion
from services.metrics import Estimate, EvalRow, EventRow, Spread, UpdateRow
from services.ray_metrics import METRICS, RewardMetrics, RunMetrics, reference


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, ...], float]]:
    """(metric, label=value, ...) -> value, as Ray was told."""
    values: dict[tuple[str, ...], float] = {}

    class Recorded:
        def __init__(self, name: str, description: str, tag_keys: Any = (), boundaries: Any = ()) -> None:
            self.name, self.keys = name, tag_keys

        def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
            assert set(tags) == set(self.keys), "Ray refuses a label that was not announced"
            assert tags["run"] == "demo"
            return (self.name, *(f"{key}={tags[key]}" for key in self.keys if key != "run"))

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self._key(tags)] = value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            values[self._key(tags)] = values.get(self._key(tags), 0) + value

        observe = set

    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, Recorded)
    yield values


def update(step: int, **changed: Any) -> UpdateRow:
    fields: dict[str, Any] = {
        "time": 1000.0 + step,
        "epoch": 0,
        "step": step,
        "max_steps": 9,
        "seconds": 2.0,
        "reward_mean": 0.5,
        "reward_std": 0.25,
        "rewards": {"ocr": Spread(mean=0.5, std=0.25, p10=0.1, p50=0.5, p90=1.0)},
        "staleness": (3, 1),
        "kl": None,
        "dropped_terms": {"style": 2},
        "phases": {"wait_s": 0.5},
        "rollout": {"sample_s": 1.5},
    }
    return UpdateRow(**(fields | changed))


def test_rows_become_values(told: dict[tuple[str, ...], float]) -> None:
    metrics = RunMetrics("demo", ["ocr", "style"])
    metrics.add(update(1))
    assert told[("dgpo_step",)] == 1 and told[("dgpo_updated_timestamp_seconds",)] == 1001
    assert told[("dgpo_reward", "reward=ocr")] == 0.5
    assert told[("dgpo_reward_quantile", "reward=ocr", "quantile=0.9")] == 1.0
    assert told[("dgpo_staleness",)] == 1, "of the last of four groups"
    assert told[("dgpo_dropped_terms", "reward=style")] == 2
    assert told[("dgpo_learner_seconds", "phase=wait")] == 0.5
    assert told[("dgpo_rollout_seconds", "phase=sample")] == 1.5
    assert ("dgpo_kl",) not in told, "what is null is left out"
    metrics.add(update(2, dropped_terms={}))
    assert told[("dgpo_dropped_terms", "reward=style")] == 0, "what is mended is told"
    metrics.add(EvalRow(time=1.0, epoch=0, step=2, prompts=4, rewards={"ocr": Estimate(mean=0.75)}))
    assert told[("dgpo_eval_reward", "reward=ocr")] == 0.75
    for _ in range(2):
        metrics.add(EventRow(time=1.0, what="worker died", detail="of one of many reasons"))
    assert told[("dgpo_events", "event=worker died")] == 2
    metrics.state("draining")
    assert (told[("dgpo_state", "state=draining")], told[("dgpo_state", "state=running")]) == (1, 0)


def test_parts_that_are_gone_are_down(told: dict[tuple[str, ...], float]) -> None:
    metrics = RunMetrics("demo")
    beat = Heartbeat(
        part="rollout-0",
        state="sampling",
        since=time.time() - 60,
        version=PolicyVersion(epoch=0, step=3),
        rss_bytes=5,
        install_s=0.25,
    )
    metrics.beats([beat], PolicyVersion(epoch=0, step=5))
    assert told[("dgpo_part_up", "part=rollout-0")] == 1
    assert told[("dgpo_part_version_lag", "part=rollout-0")] == 2
    assert told[("dgpo_part_install_seconds", "part=rollout-0")] == 0.25
    assert told[("dgpo_part_state_seconds", "part=rollout-0")] == pytest.approx(60, abs=5)
    metrics.beats([], None)
    assert told[("dgpo_part_up", "part=rollout-0")] == 0


def test_series_do_not_grow_with_the_run(told: dict[tuple[str, ...], float]) -> None:
    metrics = RunMetrics("demo", ["ocr", "style"])
    metrics.add(update(1))
    metrics.add(EventRow(time=1.0, what="dead letter", detail="ordinal 1", ordinal=1))
    metrics.beats([Heartbeat(part="rollout-0", state="sampling", since=1.0, ordinal=1)], None)
    before = len(told)
    for step in range(2, 50):
        metrics.add(update(step, reward_mean=step / 50, phases={"wait_s": float(step)}))
        metrics.add(EventRow(time=1.0, what="dead letter", detail=f"ordinal {step}", ordinal=step))
        beat = Heartbeat(part="rollout-0", state=f"ordinal {step}", since=float(step), ordinal=step, pid=step)
        metrics.beats([beat], None)
    assert len(told) == before


def test_requests_to_rewards_are_counted(told: dict[tuple[str, ...], float]) -> None:
    metrics = RewardMetrics("demo")
    metrics.asked("ocr", 0.25, None)
    assert told == {("dgpo_reward_request_seconds", "reward=ocr"): 0.25}
    metrics.asked("ocr", 0.5, TimeoutError("after many words"))
    assert told[("dgpo_reward_errors", "reward=ocr", "error=TimeoutError")] == 1


def test_the_page_lists_every_metric() -> None:
    assert reference() in (PROJECT_ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    assert all(told.text.endswith(".") for told in METRICS.values())
