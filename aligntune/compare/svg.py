"""Charts as inline SVG. Colours are CSS variables of the page, so that a chart follows its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 540, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 44


@dataclass(frozen=True)
class Line:
    """A curve; `css` names its colour ("a", "b", "y"), `band` is (low, high) around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    css: str
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Frame:
    """Data ranges and where they lie on the page."""

    x0: float
    x1: float
    y0: float
    y1: float
    height: int = HEIGHT

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        bottom = self.height - BOTTOM
        return bottom - (value - self.y0) / ((self.y1 - self.y0) or 1.0) * (bottom - TOP)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9) * step
    return [first + step * n for n in range(int((high - first) / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label: as many digits as it needs."""
    if value == 0 or abs(value) < 1e-300:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    return f"{value:.3g}"


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, zero: bool = False, title: str) -> str:
    """Curves over steps, with bands; None for a point that is not there is not expected."""
    values = [value for line in lines for value in (*line.y, *(line.band[0] if line.band else ()),
                                                    *(line.band[1] if line.band else ())) if math.isfinite(value)]
    places = [value for line in lines for value in line.x]
    if not values:
        return ""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    frame = Frame(min(places), max(places), low - margin, high + margin)
    parts = [_axes(frame, x_label, y_label)]
    if zero:
        level = f"{frame.y(0):.1f}"
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level}" y2="{level}"/>')
    for line in lines:
        if line.band is not None:
            there = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.band[1], strict=True)]
            back = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.band[0], strict=True)]
            parts.append(f'<polygon class="band {line.css}" points="{" ".join(there + back[::-1])}"/>')
    for line in lines:
        points = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        parts.append(f'<polyline class="curve {line.css}" points="{" ".join(points)}"><title>{escape(line.label)}'
                     "</title></polyline>")
    return _svg("".join(parts), HEIGHT, title)


def histogram(rows: Sequence[tuple[str, Sequence[float], str]], *, x_label: str, title: str, bins: int = 40) -> str:
    """Distributions over one axis, one row each, with ticks at p10, p50 and p90."""
    everything = np.concatenate([np.asarray(values) for _, values, _ in rows])
    if not len(everything):
        return ""
    low, high = float(everything.min()), float(np.quantile(everything, 0.99))
    high = max(high, low * 1.02)
    margin = (high - low) * 0.04
    row_height = 78
    height = TOP + row_height * len(rows) + BOTTOM
    frame = Frame(low - margin, high + margin, 0, 1, height)
    parts = [_x_axis(frame, x_label)]
    for number_, (label, values, css) in enumerate(rows):
        base = TOP + row_height * (number_ + 1) - 6
        array = np.clip(np.asarray(values), None, high)
        counts, edges = np.histogram(array, bins=bins, range=(low, high))
        most = max(int(counts.max()), 1)
        for count, start, end in zip(counts, edges, edges[1:], strict=False):
            if count:
                tall = (row_height - 26) * count / most
                parts.append(f'<rect class="fill {css}" x="{frame.x(start) + 0.5:.1f}" y="{base - tall:.1f}" '
                             f'width="{max(frame.x(end) - frame.x(start) - 1, 1):.1f}" height="{tall:.1f}">'
                             f"<title>{count} steps of {number(float(start))} to {number(float(end))}</title></rect>")
        for share, name in ((0.1, "p10"), (0.5, "p50"), (0.9, "p90")):
            place = frame.x(min(float(np.quantile(values, share)), high))
            parts.append(f'<line class="mark {css}" x1="{place:.1f}" x2="{place:.1f}" y1="{base - row_height + 24}" '
                         f'y2="{base + 4}"><title>{name}: {float(np.quantile(values, share)):.4g}</title></line>')
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        parts.append(f'<text class="label" x="{LEFT}" y="{base - row_height + 18}">{_short(label)}</text>')
    return _svg("".join(parts), height, title)


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str, title: str) -> str:
    """One bar a row of named parts; parts of one name share a colour, and the legend lists them."""
    names = list(dict.fromkeys(name for _, parts in rows for name, _ in parts))
    most = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    if most <= 0:
        return ""
    bar, gap, legend = 34, 26, 22 * -(-len(names) // 4)
    height = TOP + legend + (bar + gap) * len(rows) + BOTTOM
    frame = Frame(0, most * 1.02, 0, 1, height)
    parts = [_x_axis(frame, unit)]
    for index, name in enumerate(names):
        x, y = LEFT + (index % 4) * 115, TOP + 22 * (index // 4)
        parts.append(f'<rect class="part p{index % 8}" x="{x}" y="{y}" width="12" height="12"/>'
                     f'<text x="{x + 17}" y="{y + 10}">{escape(name)}</text>')
    for number_, (label, pieces) in enumerate(rows):
        top = TOP + legend + (bar + gap) * number_ + gap - 6
        total = sum(value for _, value in pieces)
        parts.append(f'<text class="label" x="{LEFT}" y="{top - 5}">{_short(label)}: {_amount(total)}</text>')
        start = 0.0
        for name, value in pieces:
            wide = frame.x(start + value) - frame.x(start)
            parts.append(f'<rect class="part p{names.index(name) % 8}" x="{frame.x(start):.1f}" y="{top}" '
                         f'width="{max(wide - 1, 0.5):.1f}" height="{bar}"><title>{escape(name)}: {value:,.4g}</title>'
                         "</rect>")
            start += value
    return _svg("".join(parts), height, title)


def _short(label: str, most: int = 62) -> str:
    return escape(label if len(label) <= most else f"{label[: most - 3]}...")


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _axes(frame: Frame, x_label: str, y_label: str) -> str:
    parts = [_x_axis(frame, x_label)]
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    middle = (TOP + frame.height - BOTTOM) / 2
    parts.append(f'<text class="tick" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
                 f"{escape(y_label)}</text>")
    return "".join(parts)


def _x_axis(frame: Frame, label: str) -> str:
    bottom = frame.height - BOTTOM
    parts = []
    for value in ticks(frame.x0, frame.x1, 7):
        x = frame.x(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
                     f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{frame.height - 8}" text-anchor="middle">'
                 f"{escape(label)}</text>")
    return "".join(parts)


def _svg(inside: str, height: int, title: str) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
            f"{inside}</svg>")
