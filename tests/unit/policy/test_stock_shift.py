"""A shift that is not that of the image size is told, by the doctor and at the start of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_pipelines import TINY

from services.config_file import load_config
from services.doctor.model import shift_findings
from services.driver import tell_other_shift
from services.progress import Progress
from services.stock_shift import other_shift
from services.telemetry import Telemetry, read_metrics

LARGE = ("model.height=1024", "model.width=1024")


@pytest.mark.parametrize(
    ("recipe", "stock"), [("flux-dev-pickscore-8gpu", "3.1582"), ("qwen-image-pickscore-8gpu", "2.0008")]
)
def test_of_a_published_model_it_is_told_before_anything_is_downloaded(recipe: str, stock: str) -> None:
    assert other_shift(load_config(recipe)) is None
    told = other_shift(load_config(recipe, LARGE))
    assert told is not None
    found, remedy = told
    assert f"for images of 1024 x 1024 is {stock} " in found
    assert f"set rollout.shift={stock}" in remedy
    assert other_shift(load_config(recipe, [*LARGE, f"rollout.shift={stock}"])) is None


def test_of_a_local_model_it_is_told_by_the_doctor_and_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TINY["flux-dev"].build(tmp_path / "model")
    local = [f"model.path={tmp_path / 'model'}", "model.height=512", "model.width=512"]
    config = load_config("flux-dev-pickscore-8gpu", [*local, "rollout.shift=3.0"])
    (finding,) = shift_findings(config)
    assert finding.ok and finding.warning
    assert "rollout.shift is 3, the stock pipeline's for images of 512 x 512 is " in finding.found
    assert finding.remedy.startswith("set rollout.shift=")
    with Telemetry(tmp_path, tensorboard=False) as telemetry:
        tell_other_shift(config, telemetry, Progress("run", 1))
    (row,) = read_metrics(tmp_path).events
    assert (row.what, row.level) == ("other shift", "warning")
    assert finding.remedy in row.detail
    assert "warning: other shift: rollout.shift is 3, " in capsys.readouterr().err
    number = finding.remedy.partition("=")[2].partition(",")[0]
    assert not shift_findings(load_config("flux-dev-pickscore-8gpu", [*local, f"rollout.shift={number}"]))


def test_a_shift_that_no_size_changes_is_the_users_own(tmp_path: Path) -> None:
    for recipe in ("quickstart", "sd35-medium-geneval", "sdxl-pickscore-8gpu"):
        changed = [] if recipe.startswith("sdxl") else ["rollout.shift=1.5"]
        assert other_shift(load_config(recipe, changed)) is None
    unknown = [*LARGE, "model.path=someone/flux"]
    assert other_shift(load_config("flux-dev-pickscore-8gpu", unknown)) is None
