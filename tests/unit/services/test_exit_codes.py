"""A failure is one readable line for people, and an exit code for programs."""

from __future__ import annotations

import subprocess
import sys


def test_a_failure_without_a_log_file_prints_no_traceback() -> None:
    code = "from services.exit_codes import run; run(lambda: 1 / 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "failed: ZeroDivisionError: division by zero"
