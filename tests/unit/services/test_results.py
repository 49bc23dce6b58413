"""The result of a run: what was not measured is null."""

from __future__ import annotations

from pathlib import Path

from services.config_file import load_config
from services.messages import PolicyVersion
from services.metrics import Estimate, EvalRow
from services.monitor import Outcome
from services.results import summary
from services.run_directory import RunDirectory
from services.telemetry import Telemetry


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    scored = {"ocr": Estimate(mean=0.5, se=0.1)}
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        telemetry.write(EvalRow(time=0, when="before", epoch=0, step=0, prompts=4, rewards=scored))
    version = PolicyVersion(epoch=0, step=1)
    outcome = Outcome(RunDirectory(tmp_path), interrupted=True, version=version, weights_digest="", seconds=1)
    result = summary(load_config("quickstart"), outcome)
    assert (result["score_before"], result["score_after"]) == (0.5, None)
    assert (result["diversity_before"], result["diversity_after"]) == (None, None)
