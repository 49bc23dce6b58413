"""The documentation as a site: it builds without a warning, and no page asks another host for anything."""

from __future__ import annotations

import doctest
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from services.config_file import PROJECT_ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra `docs`)")

LOADS = {"src", "srcset", "poster", "data", "action"}
"""Attributes that a browser loads by itself, or sends to; `href` only of a <link>."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    built = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return place


class Loaded(HTMLParser):
    """Addresses that a page makes the browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in LOADS or (tag in ("link", "base") and name == "href") or name == "xlink:href":
                self.addresses.append(value or "")
            elif name == "style":
                self.addresses += _in_style(value or "")


def _in_style(text: str) -> list[str]:
    found = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s;]+)", text)
    return [address for address in found if not address.startswith("data:")]


def _elsewhere(address: str) -> bool:
    return address.startswith("//") or re.match(r"[a-z][a-z0-9+.-]*:", address) is not None


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(PROJECT_ROOT / "docs") for path in (PROJECT_ROOT / "docs").rglob("*.md")}
    built = {
        path.with_name("index.html") if path.name == "README.md" else path.with_suffix(".html")
        for path in pages
    }
    assert [str(path) for path in sorted(built) if not (site / path).is_file()] == []
    assert "make quickstart" in (site / "index.html").read_text(encoding="utf-8")


def test_no_page_loads_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        reader = Loaded()
        reader.feed(text)
        asked = reader.addresses + _in_style("".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL)))
        assert [address for address in asked if _elsewhere(address)] == [], page
        # What makes the theme's script ask a host by itself: diagrams of Mermaid, the stars of a repository.
        assert 'class="mermaid"' not in text and 'data-md-component="source"' not in text, page


def test_no_style_loads_from_another_host(site: Path) -> None:
    for style in sorted(site.rglob("*.css")):
        asked = _in_style(style.read_text(encoding="utf-8"))
        assert [address for address in asked if _elsewhere(address)] == [], style


def test_links_out_of_the_docs() -> None:
    spec = importlib.util.spec_from_file_location("site_hooks", PROJECT_ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    failed, tried = doctest.testmod(hooks)
    assert tried > 0 and failed == 0
