"""A resumed run goes on with what it was told, if what it has made so far stays valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from learner import checkpoint
from learner.checkpoint import CheckpointsUnusable, write_checkpoint
from services.config_file import ConfigError
from services.config_file import load_config as load
from services.metrics import UpdateRow
from services.resuming import reconfigure
from services.run_directory import RunDirectory
from services.telemetry import METRICS_FILE, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(load("quickstart", [f"run.directory={tmp_path}"]))


def formers(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.root.glob("config.yaml*"))


def test_overrides_are_kept_and_so_is_what_was_before(run: RunDirectory) -> None:
    start = run.config()
    for steps in (200, 300):
        reconfigure(run, run.config((f"learner.max_steps={steps}", "learner.groups_per_step=4")))
        assert RunDirectory.open(run.root).config().learner.max_steps == steps
    assert RunDirectory.open(run.root).config().learner.groups_per_step == 4
    assert formers(run) == ["config.yaml", "config.yaml.before-1", "config.yaml.before-2"]
    former = run.root / "config.yaml.before-1"
    former.rename(former.with_suffix(".yaml"))
    assert load(former.with_suffix(".yaml")) == start


def test_nothing_is_written_where_nothing_changes(run: RunDirectory) -> None:
    reconfigure(run, run.config())
    assert formers(run) == ["config.yaml"]


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other",
        "run.seed=1",
        "run.directory=elsewhere",
        "model.path=quickstart/other",
        "model.train=lora",
        "model.lora.rank=8",
        "model.height=64",
        "prompts={source: file, path: prompts.txt}",
        "rollout.group_size=32",
        "rollout.steps=12",
        "rollout.guidance=2.0",
        "rewards.0.name=other",
        "rewards.1.required=false",
        "learner.optimizer=adamw8bit",
        "objective.reference=frozen",
        "objective.reference_of=rollout",
        "objective.clip_range=null",
        "eval.seed=1",
        "eval.solver=euler",
        "rollout.order=3",
    ],
)
def test_what_the_run_depends_on_is_refused_by_name(run: RunDirectory, override: str) -> None:
    name = override.partition("=")[0].replace(".0.", "[].").replace(".1.", "[].")
    before = run.config_file.read_bytes()
    with pytest.raises(ConfigError) as caught:
        reconfigure(run, run.config((override, "learner.max_steps=300")))
    assert f"  {name}" in str(caught.value)
    assert "the run has" in str(caught.value)
    assert "max_steps" not in str(caught.value)
    assert run.config_file.read_bytes() == before
    assert formers(run) == ["config.yaml"]


@pytest.mark.parametrize(
    "override",
    [
        "model.device=cpu",
        "model.text_encoders=cached",
        "model.compile=true",
        "learner.micro_batch=auto",
        "rewards.0.weight=2",
        "objective.clip_range=1e-3",
        "queue.max_staleness=0",
        "rollout.workers=1",
    ],
)
def test_what_may_change_may(run: RunDirectory, override: str) -> None:
    config = run.config((override,))
    reconfigure(run, config)
    assert run.config() == config


def test_checkpoints_with_past_references_hold_the_staleness(tmp_path: Path) -> None:
    settings = [f"run.directory={tmp_path}", "objective.reference_of=rollout"]
    run = RunDirectory.create(load("quickstart", settings))
    with pytest.raises(ConfigError, match=r"queue\.max_staleness"):
        reconfigure(run, run.config(("queue.max_staleness=2",)))


def test_a_run_that_is_done_has_nothing_to_resume(run: RunDirectory) -> None:
    state = {"policy": {"w": torch.zeros(1)}}
    write_checkpoint(run.root, 36, state, {"epoch": 0}, keep=1)
    # Stopped before its last evaluation: a resume makes it.
    reconfigure(run, run.config())
    with pytest.raises(ConfigError, match=r"nothing to do: 36 updates are done and learner\.max_steps is 4"):
        reconfigure(run, run.config(("learner.max_steps=4",)))
    row = {"kind": "eval", "time": 0.0, "when": "after", "epoch": 0, "step": 36, "prompts": 8}
    (run.root / METRICS_FILE).write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"nothing to do: 36 .* N above 36"):
        reconfigure(run, run.config())
    assert formers(run) == ["config.yaml"]
    # It had gone on from there, and died before a checkpoint.
    told = {"time": 1.0, "epoch": 1, "step": 37, "max_steps": 40, "seconds": 1.0}
    beyond = UpdateRow.model_validate(told | {"reward_mean": 0.5, "reward_std": 0.1})
    (run.root / METRICS_FILE).write_text(f"{json.dumps(row)}\n{beyond.model_dump_json()}\n")
    assert read_metrics(run.root).evaluation("after") is None
    with pytest.raises(ConfigError, match=r"nothing to do: 36 .* N above 36"):
        reconfigure(run, run.config())
    reconfigure(run, run.config(("learner.max_steps=40",)))


def test_a_checkpoint_is_left_for_the_learner_to_verify(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it twice waits twice; without a usable manifest there is nothing to wait for."""
    written = write_checkpoint(run.root, 8, {"policy": {"w": torch.zeros(1)}}, {"epoch": 0}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_of", None)
        reconfigure(run, run.config(("learner.max_steps=300",)))
        (written / "policy.safetensors").unlink()
        with pytest.raises(CheckpointsUnusable, match=r"step-8/policy\.safetensors: not there"):
            reconfigure(run, run.config(("learner.max_steps=400",)))
    assert run.config().learner.max_steps == 300


def test_a_run_whose_last_checkpoint_is_damaged_has_something_to_do(run: RunDirectory) -> None:
    state = {"policy": {"w": torch.zeros(1)}}
    for step in (30, 36):
        written = write_checkpoint(run.root, step, state, {"epoch": 0}, keep=2)
    row = {"kind": "eval", "time": 0.0, "when": "after", "epoch": 0, "step": 36, "prompts": 8}
    (run.root / METRICS_FILE).write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="nothing to do"):
        reconfigure(run, run.config())
    file = written / "policy.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    reconfigure(run, run.config())
