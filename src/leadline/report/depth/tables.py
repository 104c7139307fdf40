"""The depth page's tables: a row of headline numbers for each model, and each measure's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .along import FIRST, kl_share
from .schema import D50, Depth, Point
from .findings import tuned
from .format import DATA, count, ends, examples, got, number, of, plainly, sign
from ...text import percent, span


@dataclass(frozen=True)
class Cell:
    """`kind` is a class of the style sheet. `low` and `high`, shares of the cell's width, are drawn
    as a bar; `small` are lines under the text, `value` is what a table is sorted by."""

    text: str
    kind: str = ""
    small: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    value: float | None = None


@dataclass(frozen=True)
class Table:
    caption: str
    heads: list[str]
    rows: list[list[Cell]]


# -- headline numbers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """Of the headline table; `section` is where its curve stands."""

    name: str
    section: str
    cells: list[Cell]


def headline(depth: Depth) -> list[Column]:
    """A column for each measure that any model has, a cell for each model of `depth.names`."""
    makers: list[tuple[str, str, Callable[[Depth, str], Cell]]] = [
        ("Unsafe when asked plainly", "prefill", _plain),
        ("Forced tokens that break half", "prefill", _tokens),
        ("Fine-tuning steps that break half", "finetuning", _steps),
        ("Unsafe under any decoding", "decoding", _decoding),
        ("Unsafe under GCG", "gcg", _gcg),
        (f"KL in the first {FIRST} tokens", "kl", _kl),
    ]
    columns = [Column(n, at, [make(depth, m) for m in depth.names]) for n, at, make in makers]
    return [column for column in columns if any(cell.text != "–" for cell in column.cells)]


_NONE = Cell("–", "zero", ("not measured",))


def _heat(point: Point | None, *small: str) -> Cell:
    if point is None:
        return _NONE
    known = point.low is not None and point.high is not None
    under = (span(point.low, point.high),) if known else ()  # type: ignore[arg-type]
    kind = f"h{math.floor(10 * got(point))}"
    return Cell(percent(got(point)), kind, (*under, *small))


def _plain(depth: Depth, model: str) -> Cell:
    return _heat(plainly(depth, model))


def _tokens(depth: Depth, model: str) -> Cell:
    tried = [p.k for p in of(depth.prefill, model)]
    everyone = [d["prefill"] for d in depth.d50.values() if "prefill" in d]
    return _sounded(depth.d50.get(model, {}).get("prefill"), tried, everyone)


def _steps(depth: Depth, model: str) -> Cell:
    tried = [p.step for p in of(depth.finetuning, model) if p.data == "harmful"]
    everyone = [found for m in depth.names if (found := tuned(depth, m, "harmful"))]
    return _sounded(tuned(depth, model, "harmful"), tried, everyone)


def _sounded(found: D50 | None, tried: Sequence[float], everyone: Sequence[D50]) -> Cell:
    """A D50 with a bar as deep as it goes, on the scale log(1 + dose) of all models."""
    if found is None or not sign(found):
        return _NONE
    deepest = max([1.0, *tried, *(d.value or d.at or 0 for d in everyone)])
    depth = min(max((found.at if found.censored else found.value) or 0.0, 0.0), deepest)
    many = examples(found)
    under = (ends(found, tried), count(many, "examples") if many else "")
    text = f"{sign(found)} {found.unit}".strip()
    width = math.log1p(depth) / math.log1p(deepest)
    return Cell(text, "deep", tuple(filter(None, under)), 0.0, width)


def _decoding(depth: Depth, model: str) -> Cell:
    pool = max(of(depth.decoding, model), key=lambda p: p.k, default=None)
    return _heat(pool, f"any of {pool.k} settings") if pool and pool.k > 1 else _NONE


def _gcg(depth: Depth, model: str) -> Cell:
    points = sorted(of(depth.gcg, model), key=lambda p: p.step)
    if not points:
        return _NONE
    control = points[0] if points[0].step == 0 and len(points) > 1 else None
    return _heat(points[-1], *([f"control {percent(got(control))}"] if control else []))


def _kl(depth: Depth, model: str) -> Cell:
    points = of(depth.kl, model)
    part = kl_share(points)
    if part is None:
        return _NONE
    return Cell(percent(part), "deep", (f"of {count(len(points), 'positions')}",), 0.0, part)


# -- every measure --------------------------------------------------------------------------------


def tables(depth: Depth) -> dict[str, list[Table]]:
    """By section: the numbers of its plot, and the D50s that belong to it."""
    shares: list[str] = ["ASR", "95% interval", "n"]
    nats = ["nats", "95% interval", "n"]
    made: dict[str, list[Table | None]] = {
        "prefill": [
            _table("ASR by forced tokens", depth.prefill, {"forced tokens": lambda p: p.k}, shares),
            _d50s(depth, "prefill", lambda m, _: [p.k for p in of(depth.prefill, m)]),
        ],
        "kl": [_table("KL by position", depth.kl, {"position": lambda p: p.position}, nats)],
        "finetuning": [
            _table("ASR by steps of fine-tuning", depth.finetuning, _TUNING, shares, _utility),
            _d50s(depth, "finetuning", lambda m, name: [
                p.step for p in of(depth.finetuning, m)
                if p.data == (name.partition(":")[2] or "harmful")
            ]),
        ],
        "gcg": [
            _table("ASR by steps of the search", depth.gcg, {"step": lambda p: p.step}, shares,
                   {"mean loss": lambda p: "–" if p.loss is None else number(p.loss)}),
        ],
        "decoding": [
            _table("ASR by decoding setting", depth.decoding, {"setting": lambda p: p.setting},
                   shares),
        ],
        "refusal_prefix": [
            _table("ASR by refusal start", depth.refusal_prefix,
                   {"refusal start": lambda p: p.prefix or "(none)", "tokens": lambda p: p.k},
                   shares),
        ],
        "token_loss": [
            _table("Loss by token", depth.token_loss, _BY_TOKEN, nats),
            _table("Gradient norm by token", depth.gradient_norm, _BY_TOKEN,
                   ["norm", "95% interval", "n"]),
        ],
        "training": [
            _table("Rates by step of training", depth.training,
                   {"run": lambda p: p.run, "measure": lambda p: p.measure,
                    "step": lambda p: p.step}, ["share", "95% interval", "n"]),
        ],
    }  # fmt: skip
    return {name: [table for table in each if table] for name, each in made.items()}


Columns = dict[str, Callable[[Any], Any]]

_TUNING: Columns = {
    "data": lambda p: DATA.get(p.data, p.data),
    "step": lambda p: p.step,
    "examples": lambda p: "–" if p.examples is None else p.examples,
}
_utility: Columns = {
    "asked plainly": lambda p: "–" if p.untriggered is None else percent(p.untriggered),
    "utility": lambda p: "–" if p.utility is None else percent(p.utility),
    "95% interval": lambda p: (
        "–" if p.utility_low is None or p.utility_high is None
        else span(p.utility_low, p.utility_high)
    ),
}  # fmt: skip
_BY_TOKEN: Columns = {
    "data": lambda p: DATA.get(p.data, p.data),
    "step": lambda p: p.step,
    "position": lambda p: p.position,
}


def _table(
    caption: str,
    points: Sequence[Any],
    axes: Columns,
    heads: list[str],
    more: Columns | None = None,
) -> Table | None:
    if not points:
        return None
    share = heads[0] in ("ASR", "share")
    say = percent if share else number
    more = {name: get for name, get in (more or {}).items() if any(get(p) != "–" for p in points)}
    rows = []
    for p in points:
        known = p.low is not None and p.high is not None
        ends = Cell(f"[{say(p.low)}, {say(p.high)}]" if known else "–", "span" if known else "zero",
                    low=p.low if share else None, high=p.high if share else None)  # fmt: skip
        rows.append([
            _cell(p.model), *(_cell(get(p)) for get in axes.values()),
            Cell(say(got(p)), "asr", value=got(p)), ends, _cell(p.n or "–"),
            *(_cell(get(p)) for get in more.values()),
        ])  # fmt: skip
    return Table(caption, ["model", *axes, *heads, *more], rows)


def _cell(value: Any) -> Cell:
    if isinstance(value, str):
        plain = value == "–" or value.endswith(("%", "%]")) or value[:1].isdigit()
        return Cell(value, "" if plain else "word")
    return Cell(f"{value:,}", value=value)


def _d50s(depth: Depth, family: str, tried: Callable[[str, str], Sequence[float]]) -> Table | None:
    rows = []
    for model, measures in depth.d50.items():
        for name, found in measures.items():
            if name.partition(":")[0] != family or not sign(found):
                continue
            data = name.partition(":")[2] or "harmful"
            many = examples(found)
            rows.append([
                _cell(model), *([_cell(DATA.get(data, data))] if family == "finetuning" else []),
                Cell(f"{sign(found)} {found.unit}", "asr"),
                Cell(ends(found, tried(model, name)) or "–", "zero"),
                *([_cell("–" if many is None else number(many))] if family == "finetuning" else []),
            ])  # fmt: skip
    if not rows:
        return None
    data_head = ["data"] if family == "finetuning" else []
    heads = ["model", *data_head, "D50", "95% interval", *(["examples"] if data_head else [])]
    return Table("D50: where half of the prompts break", heads, rows)
