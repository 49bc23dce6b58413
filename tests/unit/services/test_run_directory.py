"""A run directory belongs to one run and one driver; its secrets belong to its owner."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from services.config import Config
from services.config_file import ConfigError, load_config
from services.run_directory import RunDirectory


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config("quickstart", [f"run.directory={tmp_path}"])


def test_the_configuration_is_kept(config: Config) -> None:
    run = RunDirectory.create(config)
    assert RunDirectory.open(run.root).config() == config
    assert (run.root / "environment.json").is_file()


def test_an_environment_without_git_and_package_is_recorded_as_unknown(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(metadata, "version", absent)
    found = json.loads((RunDirectory.create(config).root / "environment.json").read_text())
    assert (found["git"], found["dgpo-cluster"], found["packages"]["torch"]) == (None, None, None)
    assert found["python"]


def test_two_runs_never_share_a_directory(config: Config) -> None:
    assert RunDirectory.create(config).root != RunDirectory.create(config).root


def test_something_else_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_an_unwritable_place_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = load_config("quickstart", [f"run.directory={tmp_path / 'file'}"])
    with pytest.raises(ConfigError, match=r"run\.directory"):
        RunDirectory.create(blocked)


def test_a_second_driver_is_refused_while_the_first_lives(config: Config) -> None:
    run = RunDirectory.create(config)
    holder = (
        "import sys; from pathlib import Path; from services.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(run.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"pid {process.pid}"), run.locked():
        pass
    process.kill()
    process.wait(timeout=30)
    with run.locked():
        pass


def test_secrets_are_readable_by_the_owner_alone(config: Config) -> None:
    run = RunDirectory.create(config)
    secret = run.secret("reward.token")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(run.secrets.stat().st_mode) == 0o700
    assert run.secret("reward.token").read_text() == secret.read_text()
    assert len(secret.read_text()) >= 32
