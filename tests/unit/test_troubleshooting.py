"""What docs/troubleshooting.md says that the program writes, the program does write."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from services.config_file import PROJECT_ROOT

PACKAGES = ("services", "policy", "rollout_workers", "reward_servers", "learner")
PAGE = (PROJECT_ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SHORTEST = 4
"""Letters of a piece between two placeholders that says something."""


@cache
def _written() -> str:
    """Every text of the code, and what other scripts hold."""
    texts = []
    for package in PACKAGES:
        for file in sorted((PROJECT_ROOT / package).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            texts += [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
        texts += [file.read_text() for file in sorted((PROJECT_ROOT / package).rglob("*.lua"))]
    texts.append((PROJECT_ROOT / "deploy" / "submit.sh").read_text(encoding="utf-8"))
    # Texts of `%`-formatted log records have the same pieces as those of f-strings.
    return re.sub(r"%[-+.\d]*[a-z]", "\0", "\0".join(texts))


def _messages() -> list[str]:
    """Lines of blocks of text, and what has a placeholder in a line of prose."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    lines = [line for kind, block in fence.findall(PAGE) if kind == "text" for line in block.splitlines()]
    prose = re.findall(r"`([^`\n]*<[^`\n]*>[^`\n]*)`", fence.sub("", PAGE))
    return lines + [text for text in prose if text != "<...>"]


@pytest.mark.parametrize("message", _messages())
def test_the_program_says_it(message: str) -> None:
    pieces = [piece for piece in re.split(r"<[^<>]*>", message) if len(piece.strip()) >= SHORTEST]
    assert pieces, message
    assert [piece for piece in pieces if piece.strip() not in _written()] == []


def test_every_setting_it_names_exists() -> None:
    reference = (PROJECT_ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    sections = "queue|rollout|learner|model|checkpoint|telemetry|objective|guard|cluster|eval"
    named = set(re.findall(rf"`({sections})\.(\w+)", PAGE)) | {
        ("rewards[]", key) for key in re.findall(r"`rewards\[\]\.(\w+)", PAGE)
    }
    assert len(named) > 20
    for section, key in sorted(named):
        places = [part for part in reference.split("\n## ") if part.startswith(f"`{section}`")]
        assert any(f"| `{key}` |" in part for part in places), f"{section}.{key}"


def test_every_state_of_a_part_it_names_is_one() -> None:
    states = re.findall(r"^\| `([a-z ]+)` \|", PAGE, re.MULTILINE)
    assert len(states) >= 5
    assert [state for state in states if state not in _written()] == []
