"""Numbers and errors as people read them, the same in the terminal and in the report.

Promises
- Pure text, no markup: callers escape and colour.
- A missing number is a dash, never an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks, at most `width` of them, each the mean of its share of the values.

    >>> sparkline([0.0, 0.5, 1.0], 8)
    '▁▅█'
    """
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale + 1e-9)] for mean in means)


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on.

    >>> duration(192), duration(3725)
    ('3:12', '1:02:05')
    """
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes in decimal units.

    >>> size(1_234_567)
    '1.2 MB'
    """
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def reason(error: BaseException) -> str:
    """What failed first, in one line: kind and last line of an error, of its cause where Ray wraps one.

    >>> reason(ValueError("no such step"))
    'ValueError: no such step'
    """
    cause = getattr(error, "cause", None) or error.__cause__ or error
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def estimate(mean: float | None, error: float | None) -> str:
    """A mean and its standard error, which one prompt alone does not have.

    >>> estimate(0.5, 0.01), estimate(0.5, None), estimate(None, None)
    ('0.500 ± 0.010', '0.500', '-')
    """
    return number(mean) + (f" ± {number(error)}" if mean is not None and error is not None else "")
