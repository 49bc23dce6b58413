"""Where a server's token may come from, and where not."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from reward_servers.server_config import ServerConfig, read_token


def test_from_a_file_or_the_environment(
    token_file: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", token)
    assert ServerConfig(app="ocr", token_file=token_file).token() == token
    assert ServerConfig(app="ocr", token_env="REWARD_TOKEN").token() == token


def test_a_file_that_others_may_read_is_refused(token_file: Path) -> None:
    token_file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_token(token_file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "short",
        "with spaces in it, and long",
        "not-ascii-\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9",
    ],
)
def test_a_token_that_is_none_is_refused(token_file: Path, text: str) -> None:
    token_file.write_text(text)
    with pytest.raises(ValueError):
        read_token(token_file)


def test_an_unset_variable_is_named() -> None:
    with pytest.raises(ValueError, match="NO_SUCH_VARIABLE"):
        ServerConfig(app="ocr", token_env="NO_SUCH_VARIABLE").token()


@pytest.mark.parametrize(
    "given", [{}, {"token_env": "A", "token_file": "b"}, {"token": "a-secret-in-arguments"}]
)
def test_no_server_without_a_token_or_with_one_in_its_arguments(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ServerConfig.model_validate({"app": "ocr"} | given)
