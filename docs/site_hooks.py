"""What `mkdocs.yml` needs beyond MkDocs: pages that are not in docs/, and links that lead out of it.

Promises
- README.md is the start page and CHANGELOG.md a page: nothing is written twice.
- A link to a page leads to the page of the site. One to another file of the repository leads to the
  repository where pyproject.toml names one (`project.urls.Repository`); else it is shown as text, never as a
  dead link.
- A link to what is not there stays as it is, so that the strict build refuses it.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent
OUTSIDE: Final = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Page of the repository's root -> page of the site."""

_LINK: Final = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE: Final = re.compile(r"^ *(```|~~~)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of one page, as the site has them."""
    source = next((there for there, name in OUTSIDE.items() if name == page.file.src_uri), None)
    return relinked(markdown, source or f"docs/{page.file.src_uri}", repository())


def repository() -> str | None:
    """The address of the repository, where one is declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address: str | None = project.get("urls", {}).get("Repository")
    return address.rstrip("/") if address else None


def relinked(markdown: str, source: str, address: str | None) -> str:
    """Links of a file of the repository as the site has them; code blocks stay as they are.

    >>> relinked("[a](docs/memory.md#x) [b](LICENSE) [c](docs/none.md)", "README.md", None)
    '[a](memory.md#x) b [c](docs/none.md)'
    >>> relinked("[`up`](../deploy/submit.sh)", "docs/cluster.md", "https://host.example/us/dgpo")
    '[`up`](https://host.example/us/dgpo/blob/main/deploy/submit.sh)'
    """
    folder = posixpath.dirname(source)
    here = _page(source) or ""

    def one(found: re.Match[str]) -> str:
        target = found["target"]
        if ":" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if (page := _page(path)) is not None:
            relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
            return f"{found['image']}[{found['text']}]({relative}{found['anchor'] or ''})"
        if path.startswith("..") or not (ROOT / path).exists():
            return found[0]
        if address is None:
            return found["text"]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{found['text']}]({address}/{kind}/main/{path}{found['anchor'] or ''})"

    lines, fenced = markdown.split("\n"), False
    for number, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            lines[number] = _LINK.sub(one, line)
    return "\n".join(lines)


def _page(path: str) -> str | None:
    """The place in the site of a file of the repository; None where the site does not have it."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/") and (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    inside = path.startswith("docs/") and (ROOT / path).is_file()
    return path.removeprefix("docs/") if inside else None
