"""Line charts and share bars as inline SVG: they take the page's colours and fonts, light and dark.

Promises
- Every text is escaped; colours are classes (`s0` ... `s5`), so that the style sheet decides.
- A series without points, a constant one and one of a single point are drawn, never divided by zero.
- At most MAX_POINTS points a series reach the page; longer runs are averaged in equal bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from services.formatting import number
from services.report.axes import Extent, Frame, Scale, axes, resume_mark, scales

MAX_POINTS = 400


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
        if self.digits is None and value is not None:
            return f"{value:.3g}"
        return number(value, self.digits or 0)


@dataclass(frozen=True)
class Share:
    """One part of a whole, in a bar of shares."""

    name: str
    seconds: float
    share: float
    tone: int


_WIDE, _SMALL = Frame(380, 190), Frame(280, 170)


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
    x, y = scales(frame, _extent(shown), floor, ceiling, whole=digits == 0)
    parts = [axes(frame, x, y), *(resume_mark(frame, x, mark) for mark in marks)]
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


def _extent(series: Sequence[Series]) -> Extent:
    everything = [point for one in series for point in one.points]
    return Extent(
        first=min(point.x for point in everything),
        last=max(point.x for point in everything),
        low=min(point.y - (point.error or 0.0) for point in everything),
        high=max(point.y + (point.error or 0.0) for point in everything),
    )


def _mean(chunk: Sequence[Point]) -> Point:
    errors = [point.error for point in chunk if point.error is not None]
    count = len(chunk)
    return Point(
        sum(point.x for point in chunk) / count,
        sum(point.y for point in chunk) / count,
        sum(errors) / len(errors) if errors else None,
    )


def _svg(frame: Frame, title: str, parts: Sequence[Markup]) -> Markup:
    opening = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        int(frame.width), int(frame.height), title
    )
    return Markup("").join([opening, *parts, Markup("</svg>")])


def _spread(one: Series, x: Scale, y: Scale) -> Markup:
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


def _line(one: Series, x: Scale, y: Scale) -> Markup:
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


def _clamped(y: Scale, value: float) -> float:
    return y(min(max(value, y.low), y.high))
