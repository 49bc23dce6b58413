"""`dgpo encode`, and workers that sample from what it has left."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from policy import text_encoders
from rollout_workers.loop import SampledGroup
from rollout_workers.policy_sampler import PolicySampler
from services.cli import app
from services.conditions import condition_cache, upcoming
from services.config import Config
from services.config_file import ConfigError, load_config
from services.messages import PolicyVersion
from services.prompts import group_task, prompt_source
from services.transports.shared_directory import SharedDirectoryTransport

SMALL = (
    *("learner.max_steps=2", "learner.groups_per_step=2", "eval.prompts=1", "eval.final_prompts=3"),
    *("rollout.group_size=2", "learner.micro_batch=2", "rollout.guidance=2", "checkpoint.every_steps=1"),
)


def recipe(runs: Path, *more: str) -> list[str]:
    return [*SMALL, "model.text_encoders=cached", f"run.directory={runs}", *more]


def encode(runs: Path, *more: str) -> dict[str, Any]:
    options = [part for value in recipe(runs, *more) for part in ("--set", value)]
    result = CliRunner().invoke(app, ["encode", "quickstart", *options, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return told


def sampled(config: Config, run: Path, ordinals: range) -> list[SampledGroup]:
    sampler, source = PolicySampler(config, run, SharedDirectoryTransport(run)), prompt_source(config)
    version = PolicyVersion(epoch=0, step=0)
    return [sampler.sample(group_task(config, source, "run", ordinal, 1, version)) for ordinal in ordinals]


@pytest.fixture
def loadings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry each time that text encoders are loaded."""
    found: list[str] = []
    load = text_encoders.load_pipeline

    def watched(parts: Any, *more: Any, **how: Any) -> Any:
        found.append(parts.pipeline)
        return load(parts, *more, **how)

    monkeypatch.setattr(text_encoders, "load_pipeline", watched)
    return found


def test_what_was_encoded_beforehand_is_sampled_from(tmp_path: Path, loadings: list[str]) -> None:
    told = encode(tmp_path)
    assert told["directory"] == str(tmp_path / "conditions")
    assert (told["prompts"], told["encoded"]) == (7, 7)
    assert encode(tmp_path) == told | {"encoded": 0}
    assert loadings == ["StableDiffusion3Pipeline"]
    config = load_config("quickstart", recipe(tmp_path))
    found = sampled(config, tmp_path / "run-1", range(4))
    assert loadings == ["StableDiffusion3Pipeline"]
    expected = sampled(load_config("quickstart", SMALL), tmp_path / "run-2", range(4))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())
        assert (ours.images == theirs.images).all()


def test_a_worker_encodes_what_comes_in_one_loading(tmp_path: Path, loadings: list[str]) -> None:
    """Four prompts and the negative one, none of which was encoded beforehand."""
    config = load_config("quickstart", recipe(tmp_path, f"model.condition_cache={tmp_path / 'elsewhere'}"))
    sampled(config, tmp_path / "run", range(4))
    assert len(loadings) == 1
    assert len(list((tmp_path / "elsewhere").rglob("*.safetensors"))) == 5
    assert not (tmp_path / "conditions").exists()


def test_what_does_not_fit_is_refused_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 5, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ConfigError, match=r"6 prompts of .* do not fit .*model\.condition_cache"):
        encode(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_recipe_that_keeps_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'device': nothing would look for"):
        encode(tmp_path, "model.text_encoders=device")
    with pytest.raises(ConfigError, match="condition_cache is for text_encoders 'cached'"):
        load_config("quickstart", ["model.condition_cache=somewhere"])


def test_every_process_looks_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beside = load_config("quickstart", ["model.text_encoders=cached"])
    named = load_config("quickstart", ["model.text_encoders=cached", "model.condition_cache=here"])
    assert condition_cache(beside) == tmp_path / "runs" / "conditions"
    monkeypatch.chdir("/")
    assert condition_cache(beside, tmp_path / "runs" / "run-1") == tmp_path / "runs" / "conditions"
    assert condition_cache(named, tmp_path / "runs" / "run-1") == tmp_path / "here"
    assert condition_cache(load_config("quickstart", [])) is None


def test_a_worker_encodes_ahead_what_its_run_needs_next(tmp_path: Path) -> None:
    """A curriculum takes prompts from beyond the number of the run's groups."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {number}" for number in range(40)))
    settings = [f"prompts={{source: file, path: {file}}}", "learner.max_steps=3", "learner.groups_per_step=4"]
    plain = load_config("quickstart", settings)
    curriculum = load_config("quickstart", [*settings, "prompts.curriculum.after=2"])
    source = prompt_source(plain)
    texts = [source.training(plain.run.seed, place).text for place in range(40)]
    assert list(upcoming(plain, source, 2)) == texts[2:12]
    assert list(upcoming(plain, source, 2, 4)) == list(upcoming(curriculum, source, 2, 4)) == texts[2:6]
    assert list(upcoming(plain, source, 10, 4)) == texts[10:12]
    assert list(upcoming(curriculum, source, 20, 4)) == texts[20:24]


def test_a_worker_encodes_ahead_from_the_place_of_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_workers.policy_sampler.AHEAD", 2)
    settings = recipe(tmp_path, "learner.max_steps=1", "prompts.curriculum.after=2")
    config = load_config("quickstart", settings)
    sampler = PolicySampler(config, tmp_path, SharedDirectoryTransport(tmp_path))
    source, version = prompt_source(config), PolicyVersion(epoch=0, step=0)
    sampler.sample(group_task(config, source, "run", 0, 1, version, place=50))
    encoded = [sampler.policy.prepared(source.training(config.run.seed, place).text) for place in (1, 50, 51)]
    assert encoded == [False, True, True]
