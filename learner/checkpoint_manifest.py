"""The manifest of a checkpoint: what its writer gives, the digest of each file, and one of all that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 1
SHARDED_FORMAT = 2
"""Of one with parts that are directories (learner/sharded_checkpoint.py)."""
MANIFEST = "manifest.json"
OWN_DIGEST = "sha256"
"""Of everything else in the manifest."""


def write_manifest(folder: Path, step: int, files: Mapping[str, Any], given: Mapping[str, Any]) -> Path:
    """Returns its file.

    Args:
        files: name -> sha256, bytes.
        given: JSON values to keep with it.

    Raises:
        OSError: it cannot be written.
    """
    sharded = any("/" in name for name in files)
    content = {**given, "format": SHARDED_FORMAT if sharded else FORMAT, "step": step, "files": files}
    file = folder / MANIFEST
    file.write_text(json.dumps(content | {OWN_DIGEST: _digest(content)}, indent=2) + "\n")
    return file


def read_manifest(folder: Path) -> dict[str, Any]:
    """What was given, with `format`, `step` and `files`.

    Raises:
        OSError: it cannot be read.
        ValueError: says what is wrong with it.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        version = content["format"]
        if version not in (FORMAT, SHARDED_FORMAT):
            raise ValueError(f"format {version}, this version reads formats {FORMAT} and {SHARDED_FORMAT}")
        # Older ones have none.
        digest = content.pop(OWN_DIGEST, None)
        if digest is not None and digest != _digest(content):
            raise ValueError("its sha256 is not that of its content: changed")
        int(content["step"])
        files = {str(name): (str(of["sha256"]), int(of["bytes"])) for name, of in content["files"].items()}
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(repr(error)) from error
    if not files:
        raise ValueError("it names no file")
    for name in files:
        inside = PurePosixPath(name)
        if len(inside.parts) > 2 or ".." in inside.parts or inside.is_absolute():
            raise ValueError(f"it names a file outside the checkpoint: {name!r}")
    return dict(content)


def _digest(content: Mapping[str, Any]) -> str:
    # As it is read back: with text for every key.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
