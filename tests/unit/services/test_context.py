"""Secrets are found by name, and what cannot be one is refused without being shown."""

from __future__ import annotations

import pytest

from services.config_file import ConfigError
from services.context import SecretPlace


def test_a_line_break_at_the_end_of_a_variable_is_no_part_of_the_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DGPO_TEST_SECRET", "abc\n")
    assert SecretPlace(env="DGPO_TEST_SECRET").read() == "abc"


@pytest.mark.parametrize("value", ["sec\nret", "s\u00e9cret"])
def test_what_no_header_can_carry_is_refused_by_name_alone(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("DGPO_TEST_SECRET", value)
    with pytest.raises(ConfigError, match="DGPO_TEST_SECRET") as caught:
        SecretPlace(env="DGPO_TEST_SECRET").read()
    assert value not in str(caught.value)
