"""`dgpo ui`: what it refuses before it serves anything."""

from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner

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
