"""Small charts as inline SVG, coloured by classes of the page's style sheet, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from pymerge.analysis.measures import Matrix

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
COLOURS = 8  # classes s0 to s7 of the style sheet


def line_chart(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    limits: tuple[float, float] | None = None,
    marks: Mapping[str, float] | None = None,
    log: bool = False,
) -> str:
    """Lines through points, with a legend below.

    Args:
        series: points (x, y) of each line; points that are not finite (with `log`: not positive) are left out.
        limits: of the y axis; default: those of the points and marks.
        marks: horizontal lines to compare with, by their labels.
        log: logarithmic y axis.
    """
    kept = {
        label: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        for label, points in series.items()
    }
    everything = [point for points in kept.values() for point in points]
    if not everything:
        return '<p class="note">Nothing to draw.</p>'
    marks = marks or {}
    low, high = limits or _limits([*(y for _, y in everything), *marks.values()], log)
    first, last = min(x for x, _ in everything), max(x for x, _ in everything)

    def place_x(x: float) -> float:
        share = (x - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def place_y(y: float) -> float:
        at, bottom, top = (math.log10(y), math.log10(low), math.log10(high)) if log else (y, low, high)
        return _TOP + (top - min(max(at, bottom), top)) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for value in _ticks(low, high, log):
        y = place_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in _whole_ticks(first, last):
        parts.append(
            f'<text class="tick" x="{place_x(value):.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{value:g}</text>'
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="tick" x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(12 {middle}) rotate(-90)"'
    parts.append(f'<text class="tick" {turned} text-anchor="middle">{escape(y_label)}</text>')
    for label, value in marks.items():
        y = place_y(value)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for number, (label, points) in enumerate(kept.items()):
        style, ordered = _style(number), sorted(points)
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in ordered)
        parts.append(f'<polyline class="{style}" points="{path}"><title>{escape(label)}</title></polyline>')
        if len(ordered) <= 1:
            parts += [
                f'<circle class="{style}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3"/>' for x, y in ordered
            ]
    return "".join(parts) + "</svg>" + _legend(list(kept))


def heat_map(labels: Sequence[str], matrix: Matrix) -> str:
    """A table of values from -1 to 1; the stronger the colour the larger the value, one colour for each sign."""
    head = "".join(f"<th>{number}</th>" for number in range(1, len(labels) + 1))
    rows = []
    for number, (label, values) in enumerate(zip(labels, matrix, strict=True), start=1):
        cells = "".join(map(_cell, values))
        rows.append(f"<tr><th>{number}&ensp;{escape(label)}</th>{cells}</tr>")
    return f'<table class="heat"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _cell(value: float) -> str:
    if math.isnan(value):
        return '<td class="none">&ndash;</td>'
    sign, shown = "plus" if value >= 0 else "minus", round(value, 2) + 0.0  # no -0.00
    return f'<td class="{sign}" style="--strength:{abs(value):.3f}">{shown:.2f}</td>'


def _legend(labels: Sequence[str]) -> str:
    items = (f'<li class="{_style(number)}">{escape(label)}</li>' for number, label in enumerate(labels))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _style(number: int) -> str:
    """Classes of a line: eight colours, and then the same ones dashed."""
    return f"s{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def _limits(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        return (low, high) if high > low else (low, 10 * low)
    low = min(low, 0.0)
    return (low, high * 1.05) if high > low else (low, low + 1.0)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between the limits: three to eight, or powers of ten."""
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        step = max(1, math.ceil((last - first) / 6))
        return [10.0**exponent for exponent in range(first, last + 1, step)]
    third = (high - low) / 3
    power = 10 ** math.floor(math.log10(third))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= third)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _whole_ticks(first: float, last: float) -> list[float]:
    """At most nine whole numbers from first to last."""
    step = max(1, math.ceil((last - first) / 8))
    return [float(value) for value in range(math.ceil(first), math.floor(last) + 1, step)]
