"""Building blocks for the tables of the depth page: cells, tables, and summary columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...text import percent, span
from .format import count, d50_examples, d50_interval, d50_number, d50_zero, number
from .schema import D50, Depth, Point


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    `kind` is a CSS class, `small` are lines under the text, `value` is the number to sort by. A bar
    is drawn from `low` to `high`, which are shares of the cell's width.
    """

    text: str
    kind: str = ""
    small: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table: its caption, column heads, and rows of cells."""

    caption: str
    heads: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Column:
    """A column of the summary table: one cell for each model of `Depth.names`."""

    name: str
    cells: list[Cell]


Fields = dict[str, Callable[[Any], Any]]
"""By column head, a function that returns a cell's value for a point."""

NOT_MEASURED = Cell("–", "zero", ("not measured",))
ASR = ("ASR", "95% interval", "n")
NATS = ("nats", "95% interval", "n")


def column(depth: Depth, name: str, cell: Callable[[Depth, str], Cell]) -> Column:
    """A summary column from a function of a model's name."""
    return Column(name, [cell(depth, model) for model in depth.names])


def heat(point: Point | None, *small: str) -> Cell:
    """A cell with a rate, coloured by its value, with its interval and `small` lines under it."""
    if point is None:
        return NOT_MEASURED
    interval = () if point.low is None or point.high is None else (span(point.low, point.high),)
    kind = f"h{math.floor(10 * point.known)}"
    return Cell(percent(point.known), kind, (*interval, *small))


def d50_cell(found: D50 | None, tried: Sequence[float], every: Sequence[D50]) -> Cell:
    """A cell with a D50. The length of its bar is the D50 as a share of the largest dose, among the
    doses `tried` and `every` model's D50, on the scale log(1 + dose)."""
    if found is None or not d50_number(found):
        return NOT_MEASURED
    largest = max([1.0, *tried, *(d.value or d.at or 0 for d in every)])
    dose = min(max((found.at if found.censored else found.value) or 0.0, 0.0), largest)
    examples, first = d50_examples(found), found.first_passage
    small = (
        "half are broken without any" if d50_zero(found) else "",
        d50_interval(found, tried),
        "" if first is None else f"first passage {number(first)}",
        count(examples, "examples") if examples else "",
    )
    width = math.log1p(dose) / math.log1p(largest)
    return Cell(d50_number(found), "deep", tuple(filter(None, small)), 0.0, width)


def table(
    caption: str,
    points: Sequence[Point],
    axes: Fields,
    heads: Sequence[str] = ASR,
    more: Fields | None = None,
) -> list[Table]:
    """A list of one table with a row for each point; empty without points.

    Its columns are the model, `axes`, value, interval, n (with the names `heads`), and those of
    `more` that are not "–" for every point. A value named "ASR" or "share" is shown in percent.
    """
    if not points:
        return []
    share = heads[0] in ("ASR", "share")
    text = percent if share else number
    more = {name: get for name, get in (more or {}).items() if any(get(p) != "–" for p in points)}
    rows = []
    for p in points:
        known = p.low is not None and p.high is not None
        interval = Cell(
            f"[{text(p.low)}, {text(p.high)}]" if p.low is not None and p.high is not None else "–",
            "span" if known else "zero",
            low=p.low if share else None,
            high=p.high if share else None,
        )
        rows.append([
            cell(p.model), *(cell(get(p)) for get in axes.values()),
            Cell(text(p.known), "asr", value=p.known), interval, cell(p.n or "–"),
            *(cell(get(p)) for get in more.values()),
        ])  # fmt: skip
    return [Table(caption, ["model", *axes, *heads, *more], rows)]


def cell(value: Any) -> Cell:
    """A cell with a plain value: words are aligned to the left, numbers to the right."""
    if isinstance(value, str):
        numeric = value == "–" or value.endswith(("%", "%]")) or value[:1].isdigit()
        return Cell(value, "" if numeric else "word")
    return Cell(f"{value:,}", value=value)


def d50_table(
    depth: Depth,
    measure: str,
    tried: Callable[[str, str], Sequence[float]],
    kinds: Callable[[str], str] | None = None,
) -> list[Table]:
    """A list of one table with every D50 of a measure, named `measure` or `measure:kind` in
    `Depth.d50`; empty if there is none.

    `tried(model, kind)` returns the doses tried. With `kinds`, which returns the label of a kind,
    there is a column for the kind and one for the number of examples.
    """
    rows = []
    for model, measures in depth.d50.items():
        for name, found in measures.items():
            base, _, kind = name.partition(":")
            if base != measure or not (d50_number(found) or found.note):
                continue
            examples = d50_examples(found)
            value = d50_number(found) or "not defined"
            first = found.first_passage
            row = [
                Cell(value, "asr"),
                Cell(d50_interval(found, tried(model, kind)) or "–", "zero"),
                Cell("–" if first is None else number(first), "zero"),
            ]
            if kinds:
                last = cell("–" if examples is None else number(examples))
                row = [cell(kinds(kind)), *row, last]
            rows.append([cell(model), *row])
    heads = ["model", *(["data"] if kinds else []), "D50", "95% interval", "first passage"]
    heads += ["examples"] if kinds else []
    return [Table("D50: the dose at which half of the prompts are broken", heads, rows)] * bool(
        rows
    )
