"""Shell blocks of the pages that are marked runnable do run.

A line `<!-- runnable -->` before a block marks it: it shows nowhere. Each runs in a shell and an empty folder
of its own, with the `dgpo` of this installation, and must end with 0.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.config_file import PROJECT_ROOT

MARK = "<!-- runnable -->"
PAGES = [PROJECT_ROOT / "README.md", *sorted((PROJECT_ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(rf"^{MARK}\n+```(?:sh|bash)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks() -> list[tuple[str, str]]:
    """Place and text of each marked block."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in _BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(1)) + 1
            found.append((f"{page.relative_to(PROJECT_ROOT)}:{line}", block[1]))
    return found


BLOCKS = _blocks()


def test_every_mark_is_before_a_shell_block() -> None:
    marks = sum(line == MARK for page in PAGES for line in page.read_text(encoding="utf-8").splitlines())
    assert marks == len(BLOCKS) > 0


@pytest.mark.integration
@pytest.mark.parametrize("block", [text for _, text in BLOCKS], ids=[place for place, _ in BLOCKS])
def test_a_block_runs(block: str, tmp_path: Path) -> None:
    beside = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        # Of a checkout that is not installed, too.
        "PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
    }
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{block}\n{ran.stdout}\n{ran.stderr}"
