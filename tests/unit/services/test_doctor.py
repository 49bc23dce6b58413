"""What the doctor sees before anything is spent."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from services.config_file import PROJECT_ROOT, load_config
from services.doctor import Finding, examine, table


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("model.path=quickstart/modle", "model", "did you mean quickstart/model?"),
        ("model.path=./nowhere", "model", "set model.path to a directory"),
        ("model.device=cuda", "devices", "set model.device to cpu or auto"),
        ("rollout.num_gpus=100", "devices", "lower num_gpus"),
        ("prompts={source: file, path: nowhere.jsonl}", "prompts", "set prompts.path and eval.path"),
        ("objective.timesteps={first: null, t_min: 0.9}", "timesteps", "see objective.timesteps"),
        ("rollout={solver: euler, sigmas: fractions}", "rollout", "set rollout"),
        ("model.revision=main", "rollout", "set rollout, or model, as it says"),
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
    for sharding, held in (("none", "the whole model"), ("fsdp", "1/3 of the model")):
        config = load_config("quickstart", [*settings, f"learner.sharding={sharding}"])
        (found,) = [f for f in examine(config) if f.what == "ranks"]
        assert found.ok
        assert "3 ranks share 8 groups an update, 3 at most each" in found.found
        assert f"0.5 CPU and 0 GPU, and holds {held}; gradients are added by gloo" in found.found
    assert not [f for f in examine(load_config("quickstart")) if f.what == "ranks"]


NCCL = [
    *("learner.publish_through=nccl", "model.device=cuda"),
    *("learner.num_gpus=1", "rollout.num_gpus=1", "eval.num_gpus=1"),
]


@pytest.mark.parametrize(
    ("package", "settings", "what", "extra"),
    [
        ("bitsandbytes", ["learner.optimizer=adamw8bit"], "optimizer", "8bit"),
        ("cupy", NCCL, "weights", "nccl"),
    ],
)
def test_what_lacks_its_package_is_found(
    package: str, settings: list[str], what: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = importlib.util.find_spec

    def without(name: str, package_: str | None = None) -> object:
        return None if name == package else found(name, package_)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    (finding,) = [finding for finding in examine(load_config("quickstart", settings)) if finding.what == what]
    assert not finding.ok
    assert f"pip install 'dgpo-cluster[{extra}]'" in finding.remedy


def test_the_table_shows_what_is_in_brackets() -> None:
    remedy = "pip install 'dgpo-cluster[8bit]'"
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(table([Finding(what="reward [a]", ok=False, found="[b]", remedy=remedy)]))
    text = screen.export_text()
    assert all(shown in text for shown in ("reward [a]", "[b]", remedy))


def test_a_run_directory_that_is_a_file_is_not_writable(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.touch()
    config = load_config("quickstart", [f"run.directory={file}"])
    (finding,) = [finding for finding in examine(config) if finding.what == "run directory"]
    assert not finding.ok and "not writable" in finding.found


def test_a_hub_id_is_no_mistyped_directory() -> None:
    config = load_config("quickstart", ["model.path=stabilityai/stable-diffusion-3.5-medium"])
    (finding,) = [finding for finding in examine(config) if finding.what == "model"]
    assert finding.ok


GROWING = "rewards.0.num_cpus=1", "rewards.0.max_replicas=9", "learner.num_cpus=1", "rollout.num_cpus=0"


def found_of(what: str, *overrides: str) -> list[Finding]:
    return [finding for finding in examine(load_config("quickstart", overrides)) if finding.what == what]


@pytest.mark.parametrize(("cpus", "warned"), [(64, False), (4, True)])
def test_what_does_not_fit_at_max_replicas_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, cpus: int, warned: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    (finding,) = found_of("max_replicas", *GROWING)
    assert (finding.ok, finding.warning) == (True, warned)
    assert " 8 x 1 = " in finding.found
    assert ("and there are 4" in finding.found, "max_replicas" in finding.remedy) == (warned, warned)


def test_of_a_cluster_the_doctor_says_what_it_must_have() -> None:
    (finding,) = found_of("max_replicas", "cluster.address=auto", *GROWING)
    assert finding.ok and not finding.warning
    assert " 8 x 1 = " in finding.found


def test_without_max_replicas_nothing_is_said_of_them() -> None:
    assert not found_of("max_replicas")


def test_memory_of_replicas_to_come_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the start, not for every replica that load may bring."""
    plenty = psutil.virtual_memory()._replace(available=64 * 1024**3)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: plenty)
    (grown,) = found_of("memory", "rewards.0.max_replicas=999")
    assert grown.ok and grown.warning
    assert "max_replicas" in grown.remedy
    (fixed,) = found_of("memory")
    assert fixed.ok and not fixed.warning


def test_a_pool_of_nodes_is_not_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (finding,) = found_of("devices", "learner.resources={trainers: 1}")
    assert not finding.ok
    assert "needs 1 trainers: 1 learner; this machine has 0" in finding.found
    assert "leave out resources" in finding.remedy


@pytest.mark.parametrize(
    ("override", "there", "told"),
    [
        (
            "rollout={workers: 3, num_gpus: 0.6}",
            2,
            "needs 1.8 GPUs (in parts that take 3 whole ones): 1.8 rollout; this machine has 2",
        ),
        ("rollout={workers: 2, num_gpus: 0.5}", 1, "1 reserved"),
    ],
)
def test_gpus_are_counted_as_they_are_taken(
    override: str, there: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (finding,) = found_of("devices", override)
    assert told in finding.found
    assert finding.ok == ("take" not in told)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("num_gpus: 0.1", "reserves 0.1 GPU, and args.device is cpu"),
        ("args: {device: cuda}", "args.device is cuda, and it reserves no GPU"),
        ("args: {device: cuda}, num_gpus: 0.1", ""),
    ],
)
def test_a_scorer_computes_where_it_reserves(settings: str, told: str) -> None:
    (finding,) = found_of("reward judge", f"rewards=[{{name: judge, app: pickscore, {settings}}}]")
    assert finding.ok
    assert finding.warning == bool(told)
    assert told in finding.found


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("text_encoder_2/model.safetensors", "the text_encoder_2 cannot be loaded: "),
        ("vae/diffusion_pytorch_model.safetensors", "the vae cannot be loaded: "),
        ("tokenizer_3/tokenizer.json", "the tokenizer_3 has no vocabulary: "),
    ],
)
def test_a_model_whose_files_are_not_whole_is_found(file: str, told: str, tmp_path: Path) -> None:
    copy = shutil.copytree(PROJECT_ROOT / "quickstart" / "model", tmp_path / "model")
    setting = f"model.path={copy}"
    (whole,) = found_of("model files", setting)
    assert whole.ok
    assert "5 safetensors files" in whole.found
    broken = copy / file
    if broken.suffix == ".json":
        broken.unlink()
    else:
        os.truncate(broken, broken.stat().st_size - 1)
    (finding,) = found_of("model files", setting)
    assert not finding.ok
    assert told in finding.found
    assert str(broken if broken.exists() else broken.parent) in finding.found


def test_weights_that_the_configuration_does_not_describe_are_found(tmp_path: Path) -> None:
    copy = shutil.copytree(PROJECT_ROOT / "quickstart" / "model", tmp_path / "model")
    config = copy / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"num_layers": settings["num_layers"] + 1}))
    (finding,) = found_of("model files", f"model.path={copy}")
    assert not finding.ok
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    assert f"the transformer is not whole: {file} lacks " in finding.found
    assert "config.json must be the one that the weights were saved with" in finding.found
    config.write_text(json.dumps(settings | {"quantization_config": {}}))
    (finding,) = found_of("model files", f"model.path={copy}")
    assert finding.ok
    assert finding.found.endswith("; but for the transformer: its config.json has a quantization_config")


def test_a_size_without_positions_is_found() -> None:
    (finding,) = found_of("rollout", "model.height=128")
    assert not finding.ok
    assert "model.height 128 and model.width 64" in finding.found
    assert "sides of at most 64 pixels (its pos_embed_max_size is 8)" in finding.found
