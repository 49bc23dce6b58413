"""`dgpo ui`: what it refuses before it serves anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services import cli_ui
from services.cli import app
from services.config_file import ConfigError
from services.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--token-env", "PAGE_TOKEN"], "at least 16"),
        (["--token-env", "PAGE_TOKEN_ABSENT"], "is not set"),
        (["--compare", "/nowhere"], "not a run directory"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
    ],
)
def test_wrong_usage_is_told(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setenv("PAGE_TOKEN", "short")
    found = CliRunner().invoke(app, ["ui", str(run.root), "--port", "0", *arguments])
    assert isinstance(found.exception, ConfigError)
    assert said in str(found.exception)


def test_a_port_that_is_taken_is_told(run: RunDirectory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = CliRunner().invoke(app, ["ui", str(run.root), "--port", port])
        assert isinstance(found.exception, ConfigError)
        assert f"port {port}" in str(found.exception)


def test_a_browser_is_given_a_file_and_not_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    assert cli_ui._opened("http://127.0.0.1:8200/?token=secret", tmp_path)
    assert opened == [(tmp_path / "open.html").as_uri()]
    assert "secret" not in opened[0]
    assert "url=http://127.0.0.1:8200/?token=secret" in (tmp_path / "open.html").read_text()
