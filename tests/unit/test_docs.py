"""The pages people read: every link leads somewhere, every file they name is there, the picture is safe."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from services.config_file import PROJECT_ROOT

PAGES = [
    PROJECT_ROOT / "README.md",
    PROJECT_ROOT / "CHANGELOG.md",
    *sorted((PROJECT_ROOT / "docs").rglob("*.md")),
]


def _name(path: Path) -> str:
    return str(path.relative_to(PROJECT_ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{_name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_code_they_name_is_there(page: Path) -> None:
    """Paths with a folder, as `services/config.py` or `services/queue_scripts/`."""
    packages = "services|policy|rollout_workers|reward_servers|learner|recipes|quickstart|benchmarks|docs"
    for path in re.findall(rf"`((?:{packages})/[\w./]*)`", page.read_text(encoding="utf-8")):
        assert (PROJECT_ROOT / path).exists(), f"{_name(page)}: {path}"


def test_every_decision_is_listed() -> None:
    folder = PROJECT_ROOT / "docs" / "decisions"
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))


def test_the_picture_is_plain_svg() -> None:
    root = ET.parse(PROJECT_ROOT / "docs" / "dataflow.svg").getroot()
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names.isdisjoint({"script", "image", "foreignObject", "use"})


def test_every_setting_in_the_readme_exists() -> None:
    reference = (PROJECT_ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for section, key in re.findall(r"`(queue|run|rollout|learner|objective)\.(\w+)", PAGES[0].read_text()):
        part = reference[reference.index(f"## `{section}`") :]
        assert f"| `{key}` |" in part.split("\n## ")[0], f"{section}.{key}"
