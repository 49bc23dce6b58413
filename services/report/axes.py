"""The axes of a chart: from values to places in the drawing, and the grid and labels beside it.

Promises
- Ticks are round numbers; labels tell neighbouring ticks apart, and a power of ten is shown once.
- Any finite range can be drawn, an empty one too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

LEFT, RIGHT, TOP, BOTTOM = 34.0, 8.0, 10.0, 20.0
LARGEST, SMALLEST = 1e100, 1e-9
"""A range beyond overflows, one below drowns in rounding: values are drawn at the border, or as zero."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Frame:
    """The drawing area; text is 10 units high, so a frame is as wide as it is shown, or text shrinks."""

    width: float
    height: float

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    start: float
    length: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * self.length


@dataclass(frozen=True)
class Extent:
    """What the values span."""

    first: float
    last: float
    low: float
    high: float


def nice_ticks(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Round numbers that cover [low, high], about `count` steps apart.

    >>> nice_ticks(0.13, 0.92)
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def scales(
    frame: Frame, extent: Extent, floor: float | None, ceiling: float | None, *, whole: bool
) -> tuple[Scale, Scale]:
    """The x and the y axis.

    Args:
        floor: the lowest value shown is this, and nothing lies below it.
        ceiling: the same at the top.
        whole: the y axis has whole numbers only.
    """
    low = _drawable(extent.low if floor is None else floor)
    high = _drawable(extent.high if ceiling is None else ceiling)
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = (max(0.0, low - pad) if low >= 0 else low - pad), high + pad
    y_ticks = nice_ticks(low, max(high, low + 4) if whole else high)
    first, last = extent.first, extent.last
    if last == first:
        first, last = first - 1, last + 1
    x_ticks = tuple(t for t in nice_ticks(first, last, 5) if first <= t <= last and t == int(t))
    x = Scale(first, last, LEFT, frame.right - LEFT, x_ticks)
    return x, Scale(y_ticks[0], y_ticks[-1], frame.bottom, TOP - frame.bottom, y_ticks)


def _drawable(value: float) -> float:
    return 0.0 if abs(value) < SMALLEST else min(max(value, -LARGEST), LARGEST)


def axes(frame: Frame, x: Scale, y: Scale) -> Markup:
    parts = []
    power, labels = _labels(y.ticks)
    if power:
        times = "×10" + str(power).translate(_SUPERSCRIPTS)
        parts.append(f'<text class="power" x="{frame.right:.0f}" y="{TOP - 3:.0f}">{times}</text>')
    for tick, label in zip(y.ticks, labels, strict=True):
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT:.0f}" x2="{frame.right:.0f}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="ytick" x="{LEFT - 6:.0f}" y="{at}">{label}</text>')
    for tick in x.ticks:
        parts.append(f'<text class="xtick" x="{x(tick):.1f}" y="{frame.height - 5:.0f}">{tick:.0f}</text>')
    return Markup("".join(parts))  # numbers only


def resume_mark(frame: Frame, x: Scale, mark: float) -> Markup:
    if not x.low <= mark <= x.high:
        return Markup("")
    at = f"{x(mark):.1f}"
    return Markup(
        f'<line class="resume" x1="{at}" x2="{at}" y1="{TOP:.0f}" y2="{frame.bottom:.0f}">'
        f"<title>resumed after step {mark:.0f}</title></line>"
    )


def _labels(ticks: Sequence[float]) -> tuple[int, list[str]]:
    """A power of ten to be shown once, and the ticks in units of it, with decimals that tell them apart."""
    largest, step = max(abs(tick) for tick in ticks), abs(ticks[1] - ticks[0])
    exponent = math.floor(math.log10(largest) + 1e-9)
    power = exponent // 3 * 3 if exponent < -2 or exponent > 3 else 0
    digits = next((d for d in range(6) if math.isclose(round(step / 10**power, d) * 10**power, step)), 6)
    return power, [f"{tick / 10**power:.{digits}f}" for tick in ticks]
