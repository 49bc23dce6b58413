"""The registry of scorers: every module in this folder is one, named after its file.

A scorer's module has `create(args, threads) -> Scorer`. It is imported only when it is asked for, so a
scorer's own dependencies are needed only where it runs.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from pydantic import ValidationError

from reward_servers.scorer import Scorer


def scorer_names() -> list[str]:
    """The names that `load_scorer` takes.

    >>> "ocr" in scorer_names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_scorer(name: str, args: dict[str, Any] | None = None, threads: int = 1) -> Scorer:
    """Make the scorer `name`.

    Raises:
        ValueError: no such scorer, or it does not take `args`.
    """
    if name not in scorer_names():
        raise ValueError(f"no scorer {name!r}; valid: {', '.join(scorer_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    try:
        scorer = module.create(args or {}, threads)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"scorer {name!r}: args: {'; '.join(lines)}") from error
    if not isinstance(scorer, Scorer):
        raise TypeError(f"scorers/{name}.py: create() returned {type(scorer).__name__}, not a Scorer")
    return scorer
