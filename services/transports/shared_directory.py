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
from services.transports.base import Reused

FOLDER: Final = "weights"
KEPT_FILES: Final = 2
"""Of each kind: the newest, and the one that somebody may be reading."""
PATIENCE_S: Final = 10.0
"""A file system between nodes may show a new file some seconds late."""
POLL_S: Final = 0.1
_NAME: Final = re.compile(r"(?P<kind>[a-z]+)-(?P<epoch>\d+)\.(?P<step>\d+)\.safetensors")

log = logging.getLogger(__name__)


class SharedDirectoryTransport(Reused):
    """See the module.

    Args:
        run_directory: of the run, in which the folder `weights` is made.
    """

    def __init__(self, run_directory: Path, *, patience_s: float = PATIENCE_S) -> None:
        super().__init__()
        self._folder = run_directory / FOLDER
        self._patience_s = patience_s
        self._begun = False

    def send(self, announcement: WeightsAnnouncement, payload: Bytes) -> None:
        if not self._begun:
            self._begin()
        file = self._file(announcement)
        partial = file.with_suffix(".partial")
        # Not `payload.tofile`: of a full disk it tells no reason, and loses what it has buffered unseen.
        with naming(partial), partial.open("wb") as opened:
            opened.write(payload.data)
        partial.replace(file)
        for older in self._versions(announcement.kind)[:-KEPT_FILES]:
            older.unlink(missing_ok=True)
        self._copied(announcement.kind, payload)

    def _begin(self) -> None:
        """What a publisher before this one has left half written goes."""
        self._folder.mkdir(exist_ok=True)
        for partial in self._folder.glob("*.partial"):
            partial.unlink(missing_ok=True)
        self._begun = True

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
                if not self._folder.is_dir():
                    log.warning("%s: there is no such folder: has this node the run directory?", self._folder)
                    return None
                if pruned or time.monotonic() > give_up:
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
