"""Line charts and share bars as inline SVG: they take the page's colours and fonts, light and dark.

Promises
- Every text is escaped; colours are classes (`s0` ... `s5`), so that the style sheet decides.
- A series without points, a constant one and one of a single point are drawn, never divided by zero.
- At most MAX_POINTS points a series reach the page; longer runs are averaged in equal bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from services.formatting import number

MAX_POINTS = 400
LEFT, RIGHT, TOP, BOTTOM = 34.0, 8.0, 10.0, 20.0
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    error: float | None = None
    """Half width of the band or error bar around y."""


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[Point, ...]
    tone: int = 0
    """Which colour of the palette."""
    dashed: bool = False
    marked: bool = False
    """Few points, each worth a dot and an error bar, instead of a band."""

    @property
    def last(self) -> float | None:
        return self.points[-1].y if self.points else None


@dataclass(frozen=True)
class Chart:
    """A figure: its title, legend and drawing."""

    title: str
    series: tuple[Series, ...]
    svg: Markup
    note: str = ""
    digits: int | None = 3

    def legend(self, value: float | None) -> str:
        """A last value; three significant digits where `digits` is None."""
        return (
            f"{value:.3g}" if self.digits is None and value is not None else number(value, self.digits or 0)
        )


@dataclass(frozen=True)
class Share:
    """One part of a whole, in a bar of shares."""

    name: str
    seconds: float
    share: float
    tone: int


@dataclass(frozen=True)
class _Frame:
    """The drawing area; text is 10 units high, so a frame is as wide as it is shown, or text shrinks."""

    width: float
    height: float

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM


_WIDE, _SMALL = _Frame(380, 190), _Frame(280, 170)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    length: float
    ticks: tuple[float, ...] = field(default=())

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * self.length


def points(pairs: Iterable[tuple[float, float | None, float | None]]) -> tuple[Point, ...]:
    """(x, y, error) triples without those that were not measured, thinned to MAX_POINTS."""
    found = [Point(x, y, error) for x, y, error in pairs if y is not None]
    if len(found) <= MAX_POINTS:
        return tuple(found)
    size = math.ceil(len(found) / MAX_POINTS)
    return tuple(_mean(found[i : i + size]) for i in range(0, len(found), size))


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    floor: float | None = None,
    ceiling: float | None = None,
    marks: Sequence[float] = (),
    note: str = "",
    digits: int | None = 3,
    small: bool = False,
) -> Chart:
    """Draw series over steps.

    Args:
        floor: lowest value that the axis must show (0 for counts).
        ceiling: highest value that the axis must show.
        marks: steps at which the run was resumed, as thin vertical lines.
        digits: decimals in the legend; 0 for counts, whose axis has whole numbers; None: as needed.
        small: for three in a row instead of two.
    """
    shown = tuple(one for one in series if one.points)
    frame = _SMALL if small else _WIDE
    if not shown:
        middle = f'<text class="none" x="{frame.width / 2:.0f}" y="{frame.height / 2:.0f}">'
        return Chart(
            title, (), _svg(frame, title, [Markup(middle + "nothing measured yet</text>")]), note, digits
        )
    x, y = _scales(frame, shown, floor, ceiling, whole=digits == 0)
    parts = [_axes(frame, x, y), *(_resume_mark(frame, x, mark) for mark in marks)]
    parts += [_spread(one, x, y) for one in shown]
    parts += [_line(one, x, y) for one in shown]
    return Chart(title, shown, _svg(frame, title, parts), note, digits)


def share_bar(label: str, shares: Sequence[Share]) -> Markup:
    """One horizontal bar, split by share; names and numbers belong in the table beside it."""
    parts = [Markup('<svg class="shares" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img">')]
    parts.append(Markup("<title>{}</title>").format(label))
    left = 0.0
    for share in shares:
        width = 1000 * share.share
        parts.append(
            Markup('<rect class="f{}" x="{}" width="{}" height="24"><title>{} {}</title></rect>').format(
                share.tone, f"{left:.1f}", f"{max(width - 1.5, 0.5):.1f}", share.name, f"{share.share:.1%}"
            )
        )
        left += width
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


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


def _mean(chunk: Sequence[Point]) -> Point:
    errors = [point.error for point in chunk if point.error is not None]
    count = len(chunk)
    return Point(
        sum(point.x for point in chunk) / count,
        sum(point.y for point in chunk) / count,
        sum(errors) / len(errors) if errors else None,
    )


def _svg(frame: _Frame, title: str, parts: Sequence[Markup]) -> Markup:
    opening = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        int(frame.width), int(frame.height), title
    )
    return Markup("").join([opening, *parts, Markup("</svg>")])


def _scales(
    frame: _Frame, series: Sequence[Series], floor: float | None, ceiling: float | None, *, whole: bool
) -> tuple[_Scale, _Scale]:
    everything = [point for one in series for point in one.points]
    lows = [point.y - (point.error or 0.0) for point in everything]
    highs = [point.y + (point.error or 0.0) for point in everything]
    low = min([*lows, *([floor] if floor is not None else [])])
    high = max([*highs, *([ceiling] if ceiling is not None else [])])
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if low == floor else low - pad), high + pad
    y_ticks = nice_ticks(low, max(high, low + 4) if whole else high)
    first, last = min(point.x for point in everything), max(point.x for point in everything)
    if last == first:
        first, last = first - 1, last + 1
    x_ticks = tuple(t for t in nice_ticks(first, last, 5) if first <= t <= last and t == int(t))
    x = _Scale(first, last, LEFT, frame.right - LEFT, x_ticks)
    return x, _Scale(y_ticks[0], y_ticks[-1], frame.bottom, TOP - frame.bottom, y_ticks)


def _axes(frame: _Frame, x: _Scale, y: _Scale) -> Markup:
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


def _resume_mark(frame: _Frame, x: _Scale, mark: float) -> Markup:
    if not x.low <= mark <= x.high:
        return Markup("")
    at = f"{x(mark):.1f}"
    return Markup(
        f'<line class="resume" x1="{at}" x2="{at}" y1="{TOP:.0f}" y2="{frame.bottom:.0f}">'
        f"<title>resumed after step {mark:.0f}</title></line>"
    )


def _spread(one: Series, x: _Scale, y: _Scale) -> Markup:
    known = [(point, point.error) for point in one.points if point.error is not None]
    if not known:
        return Markup("")
    if one.marked:
        bars = (
            f"M{x(p.x):.1f} {_clamped(y, p.y - e):.1f}V{_clamped(y, p.y + e):.1f}" for p, e in known if e > 0
        )
        return Markup(f'<path class="bar s{one.tone}" d="{"".join(bars)}"/>')
    upper = [f"{x(p.x):.1f} {_clamped(y, p.y + e):.1f}" for p, e in known]
    lower = [f"{x(p.x):.1f} {_clamped(y, p.y - e):.1f}" for p, e in reversed(known)]
    return Markup(f'<path class="band f{one.tone}" d="M{"L".join(upper + lower)}Z"/>')


def _line(one: Series, x: _Scale, y: _Scale) -> Markup:
    path = "L".join(f"{x(p.x):.1f} {_clamped(y, p.y):.1f}" for p in one.points)
    dashes = " dashed" if one.dashed else ""
    parts = [f'<path class="line s{one.tone}{dashes}" d="M{path}"/>']
    if one.marked or len(one.points) == 1:
        parts += [
            f'<circle class="f{one.tone}" cx="{x(p.x):.1f}" cy="{_clamped(y, p.y):.1f}" r="2.6">'
            f"<title>step {p.x:.0f}: {p.y:.4g}</title></circle>"
            for p in one.points
        ]
    return Markup("".join(parts))  # numbers only


def _clamped(y: _Scale, value: float) -> float:
    return y(min(max(value, y.low), y.high))


def _labels(ticks: Sequence[float]) -> tuple[int, list[str]]:
    """A power of ten to be shown once, and the ticks in units of it, with decimals that tell them apart."""
    largest, step = max(abs(tick) for tick in ticks), abs(ticks[1] - ticks[0])
    exponent = math.floor(math.log10(largest) + 1e-9)
    power = exponent // 3 * 3 if exponent < -2 or exponent > 3 else 0
    digits = next((d for d in range(6) if math.isclose(round(step / 10**power, d) * 10**power, step)), 6)
    return power, [f"{tick / 10**power:.{digits}f}" for tick in ticks]
