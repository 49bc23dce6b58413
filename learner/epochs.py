"""The newest epoch of a run, in its directory: none begins twice, whatever the queue server has forgotten.

An epoch that began again would give its versions to other weights. Workers that have the old ones under that
name would keep them, and what they sample would be taken for what it is not.
"""

from __future__ import annotations

import json
from pathlib import Path

from services.config_file import ConfigError
from services.whole_file import write_whole

NONE = -1


class EpochFile:
    """Written before anybody hears of the epoch."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / "epoch.json"

    def read(self) -> int:
        """`NONE` where none has begun.

        Raises:
            ConfigError: the file is not what `keep` wrote.
        """
        try:
            return int(json.loads(self._path.read_text())["epoch"])
        except FileNotFoundError:
            return NONE
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{self._path}: unreadable ({error!r}); write {{"epoch": N}} into it, with N no smaller than '
                "any epoch of metrics.jsonl"
            ) from error

    def keep(self, epoch: int) -> None:
        if epoch > self.read():
            write_whole(self._path, json.dumps({"epoch": epoch}))
