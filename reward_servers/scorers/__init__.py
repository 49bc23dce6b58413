"""The registry of scorers: every module in this folder is one, named after its file.

A scorer's module has `create(args, threads) -> Scorer`. It is imported only when it is asked for, so a
scorer's own dependencies are needed only where it runs. A scorer of another package is named by where its
`create` is: `package.module:create`.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from reward_servers.protocol import explained
from reward_servers.scorer import Scorer


def scorer_names() -> list[str]:
    """The scorers of this folder.

    >>> "ocr" in scorer_names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def is_scorer(name: str) -> bool:
    """Whether `load_scorer` knows where to look; the scorer itself is not imported.

    >>> is_scorer("ocr"), is_scorer("orc"), is_scorer("reward_servers.scorers.ocr:create")
    (True, False, True)
    """
    module, separator, attribute = name.partition(":")
    if not separator:
        return name in scorer_names()
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        return False
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of the package that it is said to be in
        return False


def require_scorer(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        ValueError: with what would be valid.
    """
    if is_scorer(name):
        return
    if ":" in name:
        raise ValueError(
            f"no scorer {name!r}: expected package.module:create of a module that can be imported"
        )
    raise ValueError(f"no scorer {name!r}; valid: {', '.join(scorer_names())}, or package.module:create")


def load_scorer(name: str, args: dict[str, Any] | None = None, threads: int = 1) -> Scorer:
    """Make the scorer `name`, one of this folder or `package.module:create`.

    Raises:
        ValueError: no such scorer, or it does not take `args`, or has no use for so many threads.
        TypeError: what it makes is no Scorer, or does not say what its arguments were.
    """
    require_scorer(name)
    module, _, attribute = name.partition(":") if ":" in name else (f"{__name__}.{name}", ":", "create")
    create = getattr(importlib.import_module(module), attribute, None)
    if create is None:
        raise ValueError(f"no scorer {name!r}: {module} has no {attribute}")
    try:
        scorer = create(args or {}, threads)
    except ValidationError as error:
        raise ValueError(f"scorer {name!r}: args: {explained(error)}") from error
    if not isinstance(scorer, Scorer):
        raise TypeError(f"{module}:{attribute}() returned {type(scorer).__name__}, not a Scorer")
    if unsaid := sorted(set(args or {}) - set(type(scorer.options).model_fields)):
        # They would be missing in its version, and scores that differ would look comparable.
        raise TypeError(f"scorer {name!r}: set `self.options` to its arguments: {unsaid[0]!r} is not there")
    if threads > 1 and not scorer.threaded:
        raise ValueError(f"scorer {name!r}: threads={threads} would do nothing: it uses one")
    return scorer
