"""Small files that are replaced whole: what reads one finds the former text or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path

from services.full_disk import naming


def write_whole(file: Path, text: str) -> None:
    """Give a file this text and a line's end.

    Raises:
        OSError: it could not be written, and is as it was; the error names the file.
    """
    partial = file.with_name(f".{file.name}.partial")
    with naming(partial), partial.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
