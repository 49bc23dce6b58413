"""What can never run is refused before anything is started: samplers that the model does not bear, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from services import driver
from services.config import Config
from services.config_file import ConfigError, load_config
from services.progress import Progress
from services.run_directory import RunDirectory
from services.train import _refuse_unusable


def test_other_sigmas_are_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(config: Config) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver, "ray_cluster", started)
    overrides = [f"run.directory={tmp_path}", "rollout.solver=euler", "rollout.sigmas=fractions"]
    config = load_config("quickstart", overrides)
    refused = "a stock StableDiffusion3Pipeline .* set rollout.sigmas to scheduler"
    with pytest.raises(ConfigError, match=refused):
        _refuse_unusable(config)
    # What records or compares starts a driver by itself.
    with pytest.raises(ConfigError, match=refused):
        driver.train(config, RunDirectory.create(config), Progress("test", 1, quiet=True))
    # Of a hub id nothing is known before it is loaded.
    _refuse_unusable(
        config.model_copy(update={"model": config.model.model_copy(update={"path": "a/hub-id"})})
    )


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
        _refuse_unusable(config)
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match=f"{named}: {file}: no PEM file of certificates"):
        _refuse_unusable(config)


def test_a_queue_server_that_cannot_be_run_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("quickstart", ["queue.server=own-valkey"])
    # The server is started from another folder.
    assert config.queue.server == tmp_path / "own-valkey"
    refused = f"queue.server: {tmp_path / 'own-valkey'} is no file that can be run"
    with pytest.raises(ConfigError, match=refused):
        _refuse_unusable(config)
    (tmp_path / "own-valkey").write_text("#!/bin/sh")
    with pytest.raises(ConfigError, match=refused):
        _refuse_unusable(config)
    (tmp_path / "own-valkey").chmod(0o700)
    _refuse_unusable(config)
