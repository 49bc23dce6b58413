"""What the doctor sees before anything is spent."""

from __future__ import annotations

import pytest
import torch

from services.config_file import load_config
from services.doctor import examine


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("model.path=quickstart/modle", "model", "did you mean quickstart/model?"),
        ("model.path=./nowhere", "model", "set model.path to a directory"),
        ("model.device=cuda", "devices", "set model.device to cpu or auto"),
        ("rollout.num_gpus=100", "devices", "lower num_gpus"),
        ("objective.timesteps={first: null, t_min: 0.9}", "timesteps", "see objective.timesteps"),
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


def test_ranks_are_told_with_what_they_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = ["learner.ranks=3", "learner.num_cpus=0.5"]
    (found,) = [f for f in examine(load_config("quickstart", settings)) if f.what == "ranks"]
    assert found.ok
    assert "3 ranks share 8 groups an update, 3 at most each" in found.found
    assert "0.5 CPU and 0 GPU; gradients are added by gloo" in found.found
    assert not [f for f in examine(load_config("quickstart")) if f.what == "ranks"]


def test_a_hub_id_is_no_mistyped_directory() -> None:
    config = load_config("quickstart", ["model.path=stabilityai/stable-diffusion-3.5-medium"])
    (finding,) = [finding for finding in examine(config) if finding.what == "model"]
    assert finding.ok
