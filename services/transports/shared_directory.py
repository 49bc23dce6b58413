"""Weights through files in the run directory, which every node must see.

Promises
- A file appears under its name when it is whole.
- The newest KEPT_FILES of each kind are kept, and none when the publisher has ended.
- A disk that takes nothing more is an OSError that names the file.

For clusters whose object stores are small, and to look at what was published: files are safetensors.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from pathlib import Path
from typing import Final

import numpy as np

from services.full_disk import naming
from services.messages import WeightsAnnouncement
from services.safetensors_layout import Bytes

FOLDER: Final = "weights"
KEPT_FILES: Final = 2
"""Of each kind: the newest, and the one that somebody may be reading."""
PATIENCE_S: Final = 10.0
"""A file system between nodes may show a new file some seconds late."""
POLL_S: Final = 0.1
_NAME: Final = re.compile(r"(?P<kind>[a-z]+)-(?P<epoch>\d+)\.(?P<step>\d+)\.safetensors")

log = logging.getLogger(__name__)


class SharedDirectoryTransport:
    """See the module.

    Args:
        run_directory: of the run, in which the folder `weights` is made.
    """

    keeps_payload = False

    def __init__(self, run_directory: Path, *, patience_s: float = PATIENCE_S) -> None:
        self._folder = run_directory / FOLDER
        self._patience_s = patience_s

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        self._folder.mkdir(exist_ok=True)
        file = self._file(announcement)
        partial = file.with_suffix(".partial")
        with naming(partial):
            payload.tofile(partial)
        partial.replace(file)
        for older in self._versions(announcement.kind)[:-KEPT_FILES]:
            older.unlink(missing_ok=True)

    def reclaim(self, kind: str) -> Bytes | None:
        return None

    def receive(self, announcement: WeightsAnnouncement) -> Bytes | None:
        file = self._file(announcement)
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                # Not mapped: a file that is cut short under a mapping ends the process.
                return np.fromfile(file, dtype=np.uint8)
            except FileNotFoundError:
                kept = self._versions(announcement.kind)
                pruned = len(kept) >= KEPT_FILES and _order(file) < _order(kept[0])
                if pruned or not self._folder.is_dir() or time.monotonic() > give_up:
                    return None
            except OSError as error:
                log.warning("weights %s: %s", file, error)
                return None
            time.sleep(POLL_S)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, announcement: WeightsAnnouncement) -> Path:
        return self._folder / f"{announcement.kind}-{announcement.version}.safetensors"

    def _versions(self, kind: str) -> list[Path]:
        """Whole files of a kind, the oldest first."""
        if not self._folder.is_dir():
            return []
        found = [
            file
            for file in self._folder.iterdir()
            if (name := _NAME.fullmatch(file.name)) and name["kind"] == kind
        ]
        return sorted(found, key=_order)


def _order(file: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(file.name)
    assert found is not None
    return int(found["epoch"]), int(found["step"])
