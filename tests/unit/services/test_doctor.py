"""What the doctor sees before anything is spent."""

from __future__ import annotations

import pytest
import torch

from services.config_file import ConfigError, load_config
from services.doctor import examine
from services.ray_runtime import ray_cluster, reserved


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("model.path=quickstart/modle", "model", "did you mean quickstart/model?"),
        ("model.path=./nowhere", "model", "set model.path to a directory"),
        ("model.device=cuda", "devices", "set model.device to cpu or auto"),
        ("rollout.num_gpus=100", "devices", "lower num_gpus"),
    ],
)
def test_what_cannot_run_is_found(
    override: str, what: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (finding,) = [finding for finding in examine(load_config("quickstart", [override])) if not finding.ok]
    assert finding.what == what
    assert remedy in finding.remedy


def test_a_hub_id_is_no_mistyped_directory() -> None:
    config = load_config("quickstart", ["model.path=stabilityai/stable-diffusion-3.5-medium"])
    (finding,) = [finding for finding in examine(config) if finding.what == "model"]
    assert finding.ok


def test_gpus_that_are_not_there_are_refused_by_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config("quickstart", ["rollout.num_gpus=100"])
    assert reserved(config, "num_gpus") == 200
    with pytest.raises(ConfigError, match="reserves 200 GPUs, this machine has"), ray_cluster(config):
        pytest.fail("a run started that could never be placed")
