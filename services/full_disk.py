"""A disk that takes nothing more: told apart from failures that pass, with the place and what to do.

Promises
- `disk_refuses` knows an error by its number, wherever it lies behind the one that was raised; one that a
  restart may mend is never taken for it.
- What was raised inside `naming` says which file it was: writing and flushing leave that out.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

REMEDIES: Final = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "have the quota raised, or delete what is not needed",
    errno.EROFS: "mount the file system writable",
}
"""Number of an error that lasts -> what mends it."""

# safetensors is not written in Python, and passes the number on in its text.
_NUMBER_IN_TEXT: Final = re.compile(r"\(os error (\d+)\)")


def disk_refuses(error: BaseException, directory: Path | None = None) -> str | None:
    """What failed, where, and what to do, if the disk took no more; None for every other error.

    An error that says what to do already, since it was made of one, does not say it twice.

    Args:
        directory: where the remedy is needed, if the error does not say.
    """
    for link in _chain(error):
        remedy = REMEDIES.get(_number(link))
        if remedy is not None:
            place = getattr(link, "filename", None)
            where = Path(place).parent if isinstance(place, str) else directory
            told = f"{type(error).__name__}: {error}"
            if f"; {remedy}" in told:
                return told
            told += f"; {remedy}"
            return told if where is None else f"{told} in {where}"
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside that names no file names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _number(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _NUMBER_IN_TEXT.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found is not None else 0
