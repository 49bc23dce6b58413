"""What tests of the run page share."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.run_directory import RunDirectory
from tests.unit.services.ui.made_runs import a_run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return a_run(tmp_path)
