"""Small plots as SVG text: lines and points on linear, logarithmic or categorical axes.

Colours come from CSS classes, so that the page's light and dark themes apply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from plora.report.text import short_float

_MOST_OF_LOG = 1e15
"""Values that span more than this are no scale but zeros and rounding errors."""

Number = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve; points that are not finite break it.

    Args:
        points: x and y.
        css: class of the stroke.
        title: shown on hovering.
        dots: mark the single points.
    """

    points: Sequence[Number]
    css: str = "line"
    title: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Point:
    """A mark with an optional error bar of ``error`` to both sides."""

    x: float
    y: float
    css: str = "dot"
    title: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Axis:
    """A scale from data to a place along an axis.

    Args:
        low: least value.
        high: greatest value; above ``low``.
        log: logarithmic; ``low`` is then positive.
        categories: names of the values 0, 1, 2, ...; empty for numbers.
        label: what it shows.
    """

    low: float
    high: float
    log: bool = False
    categories: Sequence[str] = field(default_factory=tuple)
    label: str = ""

    def place(self, value: float) -> float:
        """Where ``value`` lies, 0 at ``low`` and 1 at ``high``."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the axis, with their labels."""
        if self.categories:
            return list(enumerate(self.categories))
        values = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        return [(value, short_float(value)) for value in values]


def number_axis(values: Sequence[float], label: str = "", log: bool | None = None) -> Axis:
    """An axis around the finite ones of ``values``; logarithmic, unless told, where they span a factor of 8 or more."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if log is None:
        log = low > 0 and low * 8 <= high < low * _MOST_OF_LOG
    if high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-300:
        low, high = (low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9) if low else (-1.0, 1.0)
    if log:
        margin = (high / low) ** 0.06
        return Axis(low / margin, high * margin, True, (), label)
    margin = 0.06 * (high - low)
    return Axis(low - margin, high + margin, False, (), label)


def category_axis(names: Sequence[str], label: str = "") -> Axis:
    """An axis with one place for each of ``names``."""
    return Axis(-0.5, len(names) - 0.5, False, tuple(names), label)


def plot(
    x: Axis, y: Axis, lines: Sequence[Line] = (), points: Sequence[Point] = (), width: int = 460, height: int = 280
) -> str:
    """A plot with axes. Later lines and points are drawn over earlier ones; what lies outside the axes is cut off."""
    frame = _Frame(x, y, width, height, left=58, right=14, top=12, bottom=44)
    drawn = [*(_line(frame, line) for line in lines), *(_point(frame, point) for point in points)]
    return _svg(width, height, _grid(frame) + _cut(frame, "".join(drawn)), f"{y.label} against {x.label}")


def sparkline(x: Axis, y: Axis, lines: Sequence[Line], width: int = 220, height: int = 90) -> str:
    """A small plot that shows only the range of y."""
    frame = _Frame(x, y, width, height, left=4, right=4, top=4, bottom=4)
    body = _cut(frame, "".join(_line(frame, line) for line in lines))
    return _svg(width, height, f'<rect class="frame" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}"/>{body}')


def thin(points: Sequence[Number], most: int) -> list[Number]:
    """At most about ``most`` points, each the mean of a run of neighbours; points that are not finite are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = -(-len(finite) // most) if finite else 1
    runs = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


@dataclass(frozen=True)
class _Frame:
    x: Axis
    y: Axis
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    def px(self, value: float) -> float:
        return self.left + self.x.place(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        place = min(2.0, max(-1.0, self.y.place(value)))
        return self.height - self.bottom - place * (self.height - self.top - self.bottom)

    def shows(self, x: float, y: float) -> bool:
        if not (math.isfinite(x) and math.isfinite(y)):
            return False
        return not (self.x.log and x <= 0) and not (self.y.log and y <= 0)


def _svg(width: int, height: int, body: str, label: str = "") -> str:
    named = f' role="img" aria-label="{escape(label)}"' if label else ' aria-hidden="true"'
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}"{named}>{body}</svg>'


def _cut(frame: _Frame, body: str) -> str:
    """``body`` without what lies outside the axes."""
    x, y = frame.left - 5, frame.top - 5  # a mark on the edge stays whole
    width, height = frame.width - frame.right + 5 - x, frame.height - frame.bottom + 5 - y
    box = f"{x} {y} {width} {height}"
    return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{box}">{body}</svg>'


def _grid(frame: _Frame) -> str:
    parts = []
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    for value, text in frame.y.ticks():
        at = frame.py(value)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(frame.left - 7, at + 3.5, text, "end"))
    for value, text in _spaced(frame):
        at = frame.px(value)
        parts.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(at, bottom + 16, text, "middle"))
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (frame.left + right) / 2
    parts.append(_text(middle, frame.height - 8, frame.x.label, "middle", "label"))
    half = (frame.top + bottom) / 2
    turned = f' transform="rotate(-90 12 {half:.1f})"'
    parts.append(_text(12, half, frame.y.label, "middle", "label", turned))
    return "".join(parts)


def _spaced(frame: _Frame) -> list[tuple[float, str]]:
    """Ticks of x whose labels don't run into each other."""
    ticks = frame.x.ticks()
    room = (frame.width - frame.left - frame.right) / max(1, len(ticks))
    if frame.x.categories:
        letters = max(3, int(room / 6))
        return [(value, text if len(text) <= letters else text[: letters - 1] + "…") for value, text in ticks]
    widest = max((len(text) for _, text in ticks), default=1) * 6 + 8
    return ticks[:: max(1, math.ceil(widest / room))]


def _text(x: float, y: float, text: str, anchor: str, css: str = "ticklabel", extra: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _line(frame: _Frame, line: Line) -> str:
    pieces: list[list[str]] = [[]]
    for x, y in line.points:
        if frame.shows(x, y):
            pieces[-1].append(f"{frame.px(x):.1f},{frame.py(y):.1f}")
        elif pieces[-1]:
            pieces.append([])
    drawn = "".join(f'<polyline points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1)
    dots = [place for piece in pieces for place in piece if line.dots or len(piece) == 1]
    drawn += "".join('<circle cx="{}" cy="{}" r="2.4"/>'.format(*place.split(",")) for place in dots)
    return f'<g class="{line.css}">{_title(line.title)}{drawn}</g>' if drawn else ""


def _point(frame: _Frame, point: Point) -> str:
    if not frame.shows(point.x, point.y):
        return ""
    x, y = frame.px(point.x), frame.py(point.y)
    bar = ""
    if point.error is not None and math.isfinite(point.error):
        ends = [frame.py(value) for value in (point.y - point.error, point.y + point.error) if frame.shows(0.5, value)]
        if len(ends) == 2:
            bar = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
    return f'<g class="{point.css}">{_title(point.title)}{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _linear_ticks(low: float, high: float, wanted: int = 7) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        values = [digit * 10.0**decade for decade in decades for digit in digits]
        values = [value for value in values if low <= value <= high]
        if len(values) >= 3:
            return values[:: -(-len(values) // 9)]
    return _linear_ticks(low, high)


def nice_categories(values: Sequence[Any]) -> list[Any]:
    """Distinct values, numbers in order before the rest as they came."""
    distinct = list(dict.fromkeys(values))
    numbers = sorted(value for value in distinct if isinstance(value, (int, float)) and not isinstance(value, bool))
    return numbers + [value for value in distinct if value not in numbers]
