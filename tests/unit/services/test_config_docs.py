"""The configuration reference: generated, complete, and committed as it is generated."""

from __future__ import annotations

from typing import get_origin

from services.config import OBJECTIVES, Config
from services.config_docs import main, reference
from services.config_file import PROJECT_ROOT


def test_the_committed_page_is_up_to_date() -> None:
    committed = (PROJECT_ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == reference(), "services/config/ has changed: run `make docs` and commit the page"


def test_every_section_is_there_and_every_key_says_what_it_means() -> None:
    page = reference()
    for name, field in Config.model_fields.items():
        place = f"{name}[]" if get_origin(field.annotation) is tuple else name
        assert f"## `{place}`" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(len(row.rstrip(" |").split(" | ")) == 4 for row in rows), "a key has no meaning"
    assert all(f"Where `name` is `{name}`" in page for name in OBJECTIVES)
    assert any("objective.timesteps" in line for line in page.splitlines())


def test_ranges_choices_and_defaults_are_told() -> None:
    page = reference()
    assert "| `beta` | number, > 0 | `100.0` |" in page
    assert "| `solver` | `dpmsolver++` or `euler` or" in page
    assert "| `path` | text | **required** |" in page
    assert "| `clip_range` | number or null" in page


def test_the_command_needs_a_file() -> None:
    assert main([]) == 2
