"""Building blocks for the plots of the depth page, as JSON data that depth.js draws.

- Curves: {x, series, selects, panels}, with `x` the title of the horizontal axis.
- Series, one for each model: {name, tone, shown}, with `tone` the number of its colour and symbol.
- Panel: {title, unit, top, views}, with one view for each combination of choices of the selects.
- View: {lines, marks}.
- Line: {s, dash, points}, with `s` the index of its series, and points [x, value, low, high, n].
- Mark: {s, x, low, high}, a D50 with its interval.
- Dot plot: {rows, series, views}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...text import visible
from .schema import D50, Depth, P, Point

Plot = dict[str, Any]


def series(depth: Depth, points: Iterable[Point]) -> list[Plot]:
    """One series for each model; a model has the same colour and symbol in every plot."""
    tones = {name: tone for tone, name in enumerate(depth.names)}
    return [
        {"name": visible(name), "tone": tones[name], "shown": True} for name in depth.having(points)
    ]


def row(x: float, point: Point) -> list[Any]:
    """A point of a line: [x, value, low, high, n]."""
    return [x, *values(point.known, point.low, point.high, point.n)]


def values(value: float, low: float | None, high: float | None, n: int) -> list[Any]:
    """[value, low, high, n], rounded for the page."""
    return [None if number is None else round(number, 5) for number in (value, low, high)] + [n]


def line(s: int, rows: Iterable[list[Any]], dash: str = "") -> Plot:
    """A line of series `s`, its points sorted by x. With `dash`, it is dashed and `dash` is its
    label."""
    return {"s": s, "dash": dash, "points": sorted(rows, key=lambda row: row[0])}


def lines(depth: Depth, points: Sequence[P], x: Callable[[P], float]) -> list[Plot]:
    """A line for each model among the points, in the order of their `series`."""
    return [
        line(s, [row(x(p), p) for p in points if p.model == model])
        for s, model in enumerate(depth.having(points))
    ]


def mark(s: int, found: D50 | None) -> list[Plot]:
    """A D50 of series `s` as a list of one mark; empty where D50 is not known."""
    if not found or found.value is None or found.censored:
        return []
    return [{"s": s, "x": found.value, "low": found.low, "high": found.high}]


def panel(title: str, lines: list[Plot], marks: Sequence[Plot] = (), **more: Any) -> Plot:
    """A panel without selects; `more` are further keys such as `unit` (default: percent)."""
    return {"title": title, "unit": "percent", "views": [{"lines": lines, "marks": marks}], **more}


def curves(depth: Depth, points: Sequence[Point], x: str, panels: list[Plot], **more: Any) -> Plot:
    """A plot of panels that share the series of `points`; `x` is the title of the horizontal
    axis, `more` are further keys."""
    return {"x": x, "series": series(depth, points), "selects": [], "panels": panels, **more}


def dots(depth: Depth, points: Sequence[P], name: Callable[[P], str]) -> Plot | None:
    """A dot plot with a row for each name of a point, and in it a dot for each model; None without
    points."""
    if not points:
        return None
    names = list(dict.fromkeys(name(p) for p in points))
    dots = {(p.model, name(p)): row(0, p)[1:] for p in points}
    by_series = [[dots.get((model, n)) for n in names] for model in depth.having(points)]
    return {
        "rows": [visible(n) for n in names],
        "series": series(depth, points),
        "views": [{"name": "", "points": by_series}],
    }
