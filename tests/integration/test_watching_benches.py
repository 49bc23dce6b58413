"""`dgpo bench telemetry` and `submit`, without the runs that they measure beside."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.submit import PHASES, phases
from benchmarks.telemetry import telemetry_costs
from services.config_file import load_config
from services.metrics import Spread, UpdateRow

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("ray_local")
def test_every_cost_of_watching_is_paid(tmp_path: Path) -> None:
    row = UpdateRow(
        time=1.0,
        epoch=0,
        step=3,
        max_steps=9,
        seconds=2.0,
        reward_mean=0.5,
        reward_std=0.1,
        rewards={"ocr": Spread(mean=0.5, std=0.1)},
    )
    costs = telemetry_costs(tmp_path, load_config("quickstart"), row, update_s=4.0, times=3)
    assert {"metrics.jsonl", "TensorBoard", "a heartbeat", "Ray's metrics of the row"} <= costs.keys()
    assert costs["a heartbeat"][1] == 4 * 4.0 / 2.0, "four parts, every two seconds"
    assert all(count > 0 for _, count in costs.values())
    assert sum(cpu_s for cpu_s, _ in costs.values()) > 0
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 9
    assert list((tmp_path / "both" / "tensorboard").iterdir()) and (tmp_path / "group.png").is_file()


def test_phases_add_up_and_what_others_outlasted_takes_no_time() -> None:
    moments = {"began": 100.0, **{name: 101.0 + place for place, (name, _) in enumerate(PHASES)}}
    moments["rewards"] = moments["models"] + 0.5
    found = phases(moments)
    assert list(found) == [name for name, _ in PHASES]
    assert sum(found.values()) == moments["update"] - moments["began"]
    assert found["models"] == 0.0
