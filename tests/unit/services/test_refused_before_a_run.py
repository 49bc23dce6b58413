"""What can never run is refused before anything is started: samplers that the model does not bear, files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from policy import registry
from services import driver, ray_runtime
from services.config import Config
from services.config_file import PROJECT_ROOT, ConfigError, load_config
from services.preflight import refuse_unusable
from services.progress import Progress
from services.run_directory import RunDirectory
from services.suites.prompts import load_suite
from services.suites.run import SuiteEvaluation, evaluate_suite


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(config: Config) -> None:
        raise AssertionError("Ray was started")

    for module in (driver, ray_runtime):
        monkeypatch.setattr(module, "ray_cluster", started)


@pytest.mark.usefixtures("no_ray")
def test_other_sigmas_are_refused_before_there_is_a_run(tmp_path: Path) -> None:
    overrides = [f"run.directory={tmp_path}", "rollout.solver=euler", "rollout.sigmas=fractions"]
    config = load_config("quickstart", overrides)
    refused = "a stock StableDiffusion3Pipeline .* set rollout.sigmas to scheduler"
    with pytest.raises(ConfigError, match=refused):
        refuse_unusable(config)
    # What records or compares starts a driver by itself.
    with pytest.raises(ConfigError, match=refused):
        driver.train(config, RunDirectory.create(config), Progress("test", 1, quiet=True))
    # Of a hub id nothing is known before it is loaded.
    refuse_unusable(config.model_copy(update={"model": config.model.model_copy(update={"path": "a/hub-id"})}))


@pytest.mark.usefixtures("no_ray")
def test_a_model_that_is_not_whole_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(PROJECT_ROOT / "quickstart" / "model", tmp_path / "model")
    file = copy / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("q_proj.weight"))
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    config = load_config("quickstart", [f"run.directory={tmp_path}", f"model.path={copy}"])
    refused = f"the text_encoder is not whole: {file} lacks 1 weight: .*q_proj.weight, of the "
    # One that is loaded in a moment is left to that.
    refuse_unusable(config)
    monkeypatch.setattr(registry, "SLOW_TO_LOAD", file.stat().st_size)
    with pytest.raises(ConfigError, match=refused):
        refuse_unusable(config)
    with pytest.raises(ConfigError, match=refused):
        driver.train(config, RunDirectory.create(config), Progress("test", 1, quiet=True))
    suite = load_suite("ocr", config, limit=1)
    with pytest.raises(ConfigError, match=refused):
        evaluate_suite(SuiteEvaluation(config, None, None, suite, samples=1), tmp_path / "suite", Console())


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("queue={url: 'rediss://db', tls_ca: %s}", "queue.tls_ca"),
        ("rewards=[{name: ocr, url: 'https://h', tls_ca: %s}]", "rewards: tls_ca of 'ocr'"),
    ],
)
def test_an_authority_that_is_none_is_refused_before_there_is_a_run(
    override: str, named: str, tmp_path: Path
) -> None:
    file = tmp_path / "ca.pem"
    config = load_config("quickstart", [override % file])
    with pytest.raises(ConfigError, match=f"{named}: {file}: cannot be read"):
        refuse_unusable(config)
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match=f"{named}: {file}: no PEM file of certificates"):
        refuse_unusable(config)


def test_a_queue_server_that_cannot_be_run_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("quickstart", ["queue.server=own-valkey"])
    # The server is started from another folder.
    assert config.queue.server == tmp_path / "own-valkey"
    refused = f"queue.server: {tmp_path / 'own-valkey'} is no file that can be run"
    with pytest.raises(ConfigError, match=refused):
        refuse_unusable(config)
    (tmp_path / "own-valkey").write_text("#!/bin/sh")
    with pytest.raises(ConfigError, match=refused):
        refuse_unusable(config)
    (tmp_path / "own-valkey").chmod(0o700)
    refuse_unusable(config)


@pytest.mark.parametrize(
    "override", ["prompts={source: file, path: %s/none.txt}", "queue.server=%s/none.txt"]
)
def test_what_costs_little_to_see_is_refused_before_anything_heavy_is_imported(
    override: str, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from services.config_file import ConfigError, load_config\n"
        "from services.preflight import refuse_unusable\n"
        "try:\n"
        f"    refuse_unusable(load_config('quickstart', ['{override % tmp_path}']))\n"
        "except ConfigError as error:\n"
        "    print(error, sorted({'torch', 'ray'} & set(sys.modules)))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "none.txt" in told and told.endswith("[]\n")
