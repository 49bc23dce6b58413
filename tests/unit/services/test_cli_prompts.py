"""`dgpo prompts`: GenEval's prompts as a file that runs and evaluations read."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli import app
from services.config_file import ConfigError
from services.prompt_lists import read_prompts


def written(file: Path, *options: str) -> list[str]:
    result = CliRunner().invoke(app, ["prompts", str(file), *options], catch_exceptions=False)
    assert result.exit_code == 0
    return [prompt.text for prompt in read_prompts(file)]


def test_the_test_has_553_prompts_with_metadata(tmp_path: Path) -> None:
    assert len(set(written(tmp_path / "test.jsonl", "--test"))) == 553
    first = read_prompts(tmp_path / "test.jsonl")[0]
    assert first.metadata["tag"] == "single_object"


def test_training_prompts_follow_from_the_seed_and_are_none_of_the_test(tmp_path: Path) -> None:
    known = written(tmp_path / "test.jsonl", "--test")
    first = written(tmp_path / "a.jsonl", "--count", "300")
    again = written(tmp_path / "b.jsonl", "--count", "300", "--held-out", str(tmp_path / "test.jsonl"))
    other = written(tmp_path / "c.jsonl", "--count", "300", "--seed", "1")
    assert first == again != other
    assert not set(first) & set(known)


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "--count", "3")
    with pytest.raises(ConfigError, match="there already"):
        written(tmp_path / "a.jsonl", "--count", "3")


def test_a_file_that_would_be_read_as_plain_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.txt: .* \.jsonl"):
        written(tmp_path / "a.txt", "--count", "3")
    assert not list(tmp_path.iterdir())


def test_a_file_that_holds_no_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"held.jsonl, line 1"):
        written(tmp_path / "a.jsonl", "--held-out", str(tmp_path / "held.jsonl"))
