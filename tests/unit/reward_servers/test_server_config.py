"""Where a server's token may come from, and where not."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from reward_servers.server_config import ServerConfig, make_token_file, read_token


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


def test_a_made_token_is_random_usable_and_never_replaced(tmp_path: Path) -> None:
    files = [tmp_path / "new" / "folder" / "token", tmp_path / "other"]
    assert all(make_token_file(file) for file in files)
    tokens = {read_token(file) for file in files}
    assert len(tokens) == 2, "another one each time"
    assert not make_token_file(files[0])
    assert read_token(files[0]) in tokens


def test_a_token_is_not_written_through_a_link(tmp_path: Path) -> None:
    link, elsewhere = tmp_path / "token", tmp_path / "elsewhere"
    link.symlink_to(elsewhere)
    assert not make_token_file(link)
    assert not elsewhere.exists()
