"""What the page ships of others is what its list says, and every file that it names is packaged."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path

from services.config_file import PROJECT_ROOT
from services.ui.app import STATIC

VENDOR = STATIC / "vendor"


def test_vendored_files_are_those_of_the_list() -> None:
    listed = dict(
        re.findall(
            r"^\| `([^`]+)` \|.*`([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), re.MULTILINE
        )
    )
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir()}
    del found["README.md"]
    assert found == listed
    assert "MIT" in (VENDOR / "uPlot.LICENSE").read_text()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = (STATIC.parent / "page.html.j2").read_text()
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert named
    for name in named - {"static/report.css"}:
        assert (STATIC.parent / name).is_file(), name
    for script in [*STATIC.glob("*.js"), STATIC / "page.css"]:
        text = script.read_text()
        assert "http://" not in text.replace("http://www.w3.org/", "")
        assert "https://" not in text
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert (STATIC / module).is_file()


def test_text_is_never_set_as_markup() -> None:
    unsafe = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(")
    for script in STATIC.glob("*.js"):
        text = script.read_text()
        assert [way for way in unsafe if way in text] == [], script.name


def test_static_files_are_in_the_wheel() -> None:
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "static/**/*" in project["tool"]["setuptools"]["package-data"]["services.ui"]
    assert (Path(STATIC) / "page.js").is_file()
