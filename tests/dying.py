"""A process that ends without a word in the middle of what it does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def dies_before(nth: int) -> Callable[[Any], Any]:
    """Wraps functions that, counted together, end the process before their n-th call."""
    calls = 0

    def deadly(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os._exit(9)
            return original(*args, **kwargs)

        return wrapped

    return deadly
