"""A disk that takes no more is told from what passes, with the file and the remedy."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from services.full_disk import disk_refuses, naming
from services.metrics import EventRow
from services.telemetry import METRICS_FILE, Telemetry


def refused(code: int, path: str | None = None) -> OSError:
    return OSError(code, os.strerror(code), path)


def wrapped(cause: Exception, says: str = "the checkpoint was not written") -> Exception:
    try:
        raise RuntimeError(says) from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            refused(errno.ENOSPC, "/a/b"),
            "OSError: [Errno 28] No space left on device: '/a/b'; free space in /a",
        ),
        (refused(errno.EDQUOT, "/a/b"), "quota raised, or delete what is not needed in /a"),
        (refused(errno.EROFS, "/a/b"), "mount the file system writable in /a"),
        (refused(errno.ENOSPC), "free space in /runs/a"),
        (
            wrapped(refused(errno.ENOSPC, "/a/b")),
            "RuntimeError: the checkpoint was not written; free space in /a",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free space in /runs/a"),
    ],
)
def test_what_lasts(error: Exception, says: str) -> None:
    told = disk_refuses(error, Path("/runs/a"))
    assert told is not None and says in told
    # What was made of it, as `dgpo export` does, and ends the command.
    assert disk_refuses(wrapped(error, told)) == f"RuntimeError: {told}"


@pytest.mark.parametrize(
    "error",
    [
        refused(errno.EIO, "/a/b"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError("no number"),
        SafetensorError("I/O error: Input/output error (os error 5)"),
        RuntimeError("(os error 28)"),
        wrapped(ValueError("28")),
    ],
)
def test_what_may_pass(error: Exception) -> None:
    assert disk_refuses(error) is None


def test_a_file_that_is_named_keeps_its_name() -> None:
    with pytest.raises(OSError, match="/a/b") as caught, naming(Path("/c/d")):
        raise refused(errno.ENOSPC, "/a/b")
    assert caught.value.filename == "/a/b"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_metrics_on_a_full_disk_name_their_file(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    told = None
    try:
        with Telemetry(tmp_path, tensorboard=False) as telemetry:
            telemetry.write(EventRow(time=time.time(), what="resumed"))
    except OSError as error:
        told = disk_refuses(error)
    assert told is not None
    assert str(tmp_path / METRICS_FILE) in told and f"free space in {tmp_path}" in told
