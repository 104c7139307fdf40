"""Building blocks for the plots of the depth page, as plain data that the page's script draws.

Curves are {x, series, selects, panels}. A panel has {title, unit, top, views}, and a view, one for
each choice of the selects, {lines, marks}: a line is {s, dash, points}, `s` the index of its series
and a point [x, value, low, high, n]; a mark is {s, x, low, high}, a D50 with its interval.
A dot plot is {rows, series, views}.
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
    """A line of series `s`, its points sorted by x. `dash` names a dashed line."""
    return {"s": s, "dash": dash, "points": sorted(rows, key=lambda row: row[0])}


def lines(depth: Depth, points: Sequence[P], x: Callable[[P], float]) -> list[Plot]:
    """A line for each model among the points, in the order of their `series`."""
    return [
        line(s, [row(x(p), p) for p in points if p.model == model])
        for s, model in enumerate(depth.having(points))
    ]


def mark(s: int, found: D50 | None) -> list[Plot]:
    """A D50 on a line of series `s`; none where it is not known."""
    if not found or found.value is None or found.censored:
        return []
    return [{"s": s, "x": found.value, "low": found.low, "high": found.high}]


def panel(title: str, lines: list[Plot], marks: Sequence[Plot] = (), **more: Any) -> Plot:
    """A panel without selects; its unit is percent unless given."""
    return {"title": title, "unit": "percent", "views": [{"lines": lines, "marks": marks}], **more}


def curves(depth: Depth, points: Sequence[Point], x: str, panels: list[Plot], **more: Any) -> Plot:
    """A plot of panels that share the series of `points`; `x` names the horizontal axis."""
    return {"x": x, "series": series(depth, points), "selects": [], "panels": panels, **more}


def dots(depth: Depth, points: Sequence[P], name: Callable[[P], str]) -> Plot | None:
    """A dot plot with a row for each name and a dot for each model."""
    if not points:
        return None
    rows = list(dict.fromkeys(name(p) for p in points))
    found = {(p.model, name(p)): row(0, p)[1:] for p in points}
    by_series = [[found.get((model, r)) for r in rows] for model in depth.having(points)]
    names = [visible(r) for r in rows]
    return {
        "rows": names,
        "series": series(depth, points),
        "views": [{"name": "", "points": by_series}],
    }
