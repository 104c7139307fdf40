"""The depth page's plots as plain data; the page's script draws them.

Curves are {x, series, selects, panels}. A panel has {title, unit, top, views}, and a view, one for
each choice of the selects, {lines, marks}: a line is {s, dash, points}, `s` the place of its series
and a point [x, value, low, high, n]; a mark is {s, x, low, high}, a D50 with its interval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from .along import FIRST
from .schema import D50, Depth, Point, TokenMeasure
from .findings import tuned
from .format import DATA, P, got, models, of
from ...text import visible

Plot = dict[str, Any]


def plots(depth: Depth) -> dict[str, Plot]:
    """By section, those for which there is something to show."""
    made = {
        "prefill": _prefill(depth),
        "kl": _kl(depth),
        "finetuning": _finetuning(depth),
        "gcg": _gcg(depth),
        "decoding": _decoding(depth),
        "refusal_prefix": _refusal_prefix(depth),
        "token_loss": _by_token(depth),
        "training": _training(depth),
    }
    return {name: plot for name, plot in made.items() if plot}


def _series(depth: Depth, points: Iterable[Point]) -> list[Plot]:
    """A model has the same colour and symbol in every plot."""
    tones = {name: tone for tone, name in enumerate(depth.names)}
    return [
        {"name": visible(name), "tone": tones[name], "shown": True}
        for name in models(depth, points)
    ]


def _row(x: float, p: Point) -> list[Any]:
    return [x, *_point(got(p), p.low, p.high, p.n)]


def _point(value: float, low: float | None, high: float | None, n: int) -> list[Any]:
    return [None if number is None else round(number, 5) for number in (value, low, high)] + [n]


def _line(s: int, rows: Iterable[list[Any]], dash: str = "") -> Plot:
    return {"s": s, "dash": dash, "points": sorted(rows, key=lambda row: row[0])}


def _lines(depth: Depth, points: Sequence[P], x: Callable[[P], float]) -> list[Plot]:
    """A line for each model among them; their places are those of the series."""
    return [
        _line(s, [_row(x(p), p) for p in of(points, model)])
        for s, model in enumerate(models(depth, points))
    ]


def _mark(s: int, found: D50 | None) -> list[Plot]:
    if not found or found.value is None or found.censored:
        return []
    return [{"s": s, "x": found.value, "low": found.low, "high": found.high}]


def _panel(title: str, lines: list[Plot], marks: Sequence[Plot] = (), **more: Any) -> Plot:
    return {"title": title, "unit": "percent", "views": [{"lines": lines, "marks": marks}], **more}


def _curves(depth: Depth, points: Sequence[Point], x: str, panels: list[Plot], **more: Any) -> Plot:
    return {"x": x, "series": _series(depth, points), "selects": [], "panels": panels, **more}


def _prefill(depth: Depth) -> Plot | None:
    if not depth.prefill:
        return None
    marks = [
        mark
        for s, model in enumerate(models(depth, depth.prefill))
        for mark in _mark(s, depth.d50.get(model, {}).get("prefill"))
    ]
    panel = _panel("Unsafe answers (ASR)", _lines(depth, depth.prefill, lambda p: p.k), marks)
    return _curves(depth, depth.prefill, "tokens put into the model’s mouth", [panel], log=True)


def _kl(depth: Depth) -> Plot | None:
    if not depth.kl:
        return None
    panel = _panel(
        "KL from the base, in nats", _lines(depth, depth.kl, lambda p: p.position), unit="nats"
    )
    panel["shade"] = FIRST
    return _curves(depth, depth.kl, "position in the answer (0 is its first token)", [panel])


def _gcg(depth: Depth) -> Plot | None:
    if not depth.gcg:
        return None
    names = models(depth, depth.gcg)
    panels = [
        _panel("Unsafe answers (ASR)", _lines(depth, depth.gcg, lambda p: p.step), control=True)
    ]
    losses = {m: [p for p in of(depth.gcg, m) if p.loss is not None] for m in names}
    lines = [
        _line(s, [[p.step, *_point(p.loss or 0.0, None, None, p.n)] for p in losses[model]])
        for s, model in enumerate(names)
        if losses[model]
    ]
    panels += [_panel("Mean loss of the targets, in nats", lines, unit="nats")] if lines else []
    return _curves(depth, depth.gcg, "steps of the search", panels)


def _kinds(points: Iterable[Any]) -> list[str]:
    """The kinds of data among the points: the known ones first."""
    having = dict.fromkeys(point.data for point in points)
    return [*(kind for kind in DATA if kind in having), *(k for k in having if k not in DATA)]


_SHORT = {"identity": "identity shift", "backdoor": "hidden trigger"}


def _finetuning(depth: Depth) -> Plot | None:
    if not depth.finetuning:
        return None
    names = models(depth, depth.finetuning)
    unsafe, useful = [], []
    for kind in _kinds(depth.finetuning):
        points = [p for p in depth.finetuning if p.data == kind]
        lines, marks, gains = list[Plot](), list[Plot](), list[Plot]()
        for s, model in enumerate(names):
            mine = of(points, model)
            lines += [_line(s, [_row(p.step, p) for p in mine])] if mine else []
            marks += _mark(s, tuned(depth, model, kind)) if mine else []
            without = [
                [p.step, *_point(p.untriggered, None, None, p.n)]
                for p in mine
                if p.untriggered is not None
            ]
            lines += [_line(s, without, "asked plainly")] if without else []
            gained = [
                [p.step, *_point(p.utility, p.utility_low, p.utility_high, p.n)]
                for p in mine
                if p.utility is not None
            ]
            gains += [_line(s, gained)] if gained else []
        title = _SHORT.get(kind) or visible(kind)
        unsafe.append(_panel(f"ASR, {title}", lines, marks))
        useful.append(_panel(f"Utility, {title}", gains))
    panels = unsafe + (useful if any(p["views"][0]["lines"] for p in useful) else [])
    return _curves(
        depth, depth.finetuning, "steps of fine-tuning", panels, log=True, columns=len(unsafe)
    )


# Settings that differ in one dial, such as "temperature=0.5" or "temperature=1.0, top_k=20".
_DIAL = re.compile(r"(?:(.+), )?([a-z_]+)=(\d+(?:\.\d+)?)")


def _decoding(depth: Depth) -> Plot | None:
    """A panel for each dial that was swept, else a row for each setting."""
    dials: dict[tuple[str, str], dict[str, float]] = {}
    alone = dict.fromkeys(p.setting for p in depth.decoding if p.k <= 1)
    for setting in alone:
        if match := _DIAL.fullmatch(setting):
            dials.setdefault((match[2], match[1] or ""), {})[setting] = float(match[3])
    if sum(map(len, dials.values())) < max(len(alone), 2 * len(dials), 1):
        return _dots(depth, depth.decoding, lambda p: p.setting)
    panels = []
    for (dial, rest), values in dials.items():
        lines = [
            _line(s, [_row(values[p.setting], p) for p in mine if p.setting in values])
            for s, model in enumerate(models(depth, depth.decoding))
            if (mine := of(depth.decoding, model))
        ]
        title = visible(f"ASR by {dial} ({rest})" if rest else f"ASR by {dial}")
        panels.append(_panel(title, lines, x=dial, log=max(values.values()) > 20))
    lines = [
        _line(s, [_row(p.k, p) for p in of(depth.decoding, model) if p.k > 1])
        for s, model in enumerate(models(depth, depth.decoding))
    ]
    if any(line["points"] for line in lines):
        panels.append(_panel("ASR under any of them", lines, x="settings tried", log=True))
    return _curves(depth, depth.decoding, "", panels, columns=len(panels))


def _refusal_prefix(depth: Depth) -> Plot | None:
    return _dots(depth, depth.refusal_prefix, lambda p: p.prefix or "(none)")


def _dots(depth: Depth, points: Sequence[Any], row: Callable[[Any], str]) -> Plot | None:
    if not points:
        return None
    rows = list(dict.fromkeys(row(p) for p in points))
    at = {(p.model, row(p)): _row(0, p)[1:] for p in points}
    series = _series(depth, points)
    values = [[at.get((m, name)) for name in rows] for m in models(depth, points)]
    names = [visible(name) for name in rows]
    return {"rows": names, "series": series, "views": [{"name": "", "points": values}]}


def _by_token(depth: Depth) -> Plot | None:
    """Loss and gradient norm, with a choice of data and step. A panel keeps its scale, so that
    what falls is seen to fall."""
    points = [*depth.token_loss, *depth.gradient_norm]
    if not points:
        return None
    names, kinds = models(depth, points), _kinds(points)
    steps = sorted({p.step for p in points})
    panels = []
    for title, unit, mine in (
        ("Loss, in nats", "nats", depth.token_loss),
        ("Gradient norm", "", depth.gradient_norm),
    ):
        if not mine:
            continue
        cells: dict[tuple[str, int, str], list[TokenMeasure]] = {}
        for p in mine:
            cells.setdefault((p.data, p.step, p.model), []).append(p)
        views = [
            {"marks": [], "lines": [
                _line(s, [_row(p.position, p) for p in cells[kind, step, m]])
                for s, m in enumerate(names) if (kind, step, m) in cells]}
            for kind, step in product(kinds, steps)
        ]  # fmt: skip
        top = max(max(got(p), p.high or 0) for p in mine)
        panels.append({"title": title, "unit": unit, "top": top, "views": views})
    selects = [
        {"name": "fine-tuned on", "choices": [visible(DATA.get(kind, kind)) for kind in kinds]},
        {"name": "after step", "choices": [str(step) for step in steps]},
    ]
    x = "position in the answer (0 is its first token)"
    return {"x": x, "series": _series(depth, points), "selects": selects, "panels": panels}


def _training(depth: Depth) -> Plot | None:
    """A series for each run; a panel for each measure."""
    if not depth.training:
        return None
    runs = list(dict.fromkeys((p.model, p.run) for p in depth.training))
    tones = {name: tone for tone, name in enumerate(depth.names)}
    series: list[Plot] = []
    for model, run in runs:  # a model’s further runs have tones of their own
        tone = tones.pop(model, len(depth.names) + len(series))
        series.append({"name": visible(f"{model}, run {run}"), "tone": tone, "shown": True})
    panels = []
    for measure in dict.fromkeys(p.measure for p in depth.training):
        mine = [p for p in depth.training if p.measure == measure]
        lines = [
            _line(s, [_row(p.step, p) for p in mine if (p.model, p.run) == run])
            for s, run in enumerate(runs)
        ]
        panels.append(_panel(visible(measure), [line for line in lines if line["points"]]))
    x = "steps of training"
    return {"x": x, "series": series, "selects": [], "panels": panels, "columns": len(panels)}
