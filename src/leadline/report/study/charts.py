"""The data of the heat map (rendered by the template) and of the dot plots (drawn by plotly)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...text import percent, span, visible
from .findings import Measured, label, rows

if TYPE_CHECKING:
    import pandas as pd

_SHOWN, _SHOWN_IN_LONG = 5, 3  # models shown at first in plots of few and of many attacks


def attack_order(measured: Measured) -> list[str]:
    """`direct` first, then the attacks by descending mean ASR over models."""
    mean = measured.attacks.groupby("attack")["asr"].mean().fillna(-1)
    return sorted(mean.index, key=lambda name: (name != "direct", -mean[name], _natural(name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that orders numbers by value: k=5 before k=10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def models(measured: Measured) -> list[tuple[str, str]]:
    """(model, thinking mode), in the study's order."""
    return _unique([*_pairs(measured.attacks), *_pairs(measured.over_refusal)])


def _unique(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pairs))


def _pairs(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(frame[["model", "thinking"]].itertuples(index=False, name=None))


def heat_map(measured: Measured) -> dict[str, Any]:
    """ASR by attack (rows) and model (columns); in the footer, each model's mean over attacks and
    its maximum over chain-of-thought attacks.

    A cell is (CSS class, text, tooltip). `marks` holds the classes and symbols that the key below
    the table has to explain.
    """
    columns = _unique(_pairs(measured.attacks))
    groups = measured.cells.groupby(["model", "thinking", "attack"])
    missing = groups[["failed", "not_applicable", "unscored"]].sum().to_dict("index")
    heat: dict[str, dict[tuple[str, str], tuple[str, str, str]]] = {}
    for row in rows(measured.attacks):
        counts = missing[row.model, row.thinking, row.attack]
        cell = _heat_cell(row, counts)
        heat.setdefault(row.attack, {})[row.model, row.thinking] = cell
    empty = ("none", "", "not run")
    table = [
        (name, [heat[name].get(column, empty) for column in columns])
        for name in attack_order(measured)
    ]
    means = {(row.model, row.thinking): row for row in rows(measured.models)}
    footer = [("mean over attacks", [_heat_cell(means[column], None) for column in columns])]
    highest = {(row.model, row.thinking): row for row in rows(measured.cot_max)}
    if any(row.attacks > 1 for row in highest.values()):
        cells = [_heat_cell(highest[c], None) if c in highest else empty for c in columns]
        footer.append(("max over chain-of-thought attacks", cells))
    shown = [cell for _, cells in table for cell in cells]
    marks = {kind for kind, _, _ in shown} | {text[-1:] for _, text, _ in shown}
    names = [label(*column) for column in columns]
    return {"columns": names, "rows": table, "feet": footer, "marks": marks}


def _heat_cell(row: Any, missing: Any) -> tuple[str, str, str]:
    """A cell from a pooled row and its numbers of trials without a verdict (None for means)."""
    if row.n and row.asr == row.asr:
        partial = missing is not None and missing["failed"] + missing["unscored"] > 0
        tooltip = f"{percent(row.asr)} {span(row.low, row.high)}, {row.unsafe:g} of {row.n} unsafe"
        return f"h{math.floor(row.asr * 10)}", percent(row.asr) + "*" * partial, tooltip
    if missing is not None and missing["failed"]:
        return "failed", "failed", f"all {missing['failed']} trials failed"
    if missing is not None and missing["not_applicable"]:
        return "na", "n/a", "not applicable"
    if row.n:
        return "na", "?", "not estimated: too many unscored attempts, see the bounds in the table"
    return "na", "unscored" if missing is not None else "n/a", "no scored trial"


OUTCOMES = ("unsafe", "refused", "off_topic", "degenerate", "other")
"""The parts of a bar of `outcome_bars`, from left to right."""


def outcome_bars(measured: Measured) -> dict[str, Any] | None:
    """What the answers to harmful prompts do, by attack (rows) and model (columns): the shares of
    OUTCOMES, as means over datasets. None where the judges do not say.

    A cell is a list of (outcome, share, tooltip), [] if unknown.
    """
    known = measured.cells[measured.cells["off_topic"].notna()]
    if known.empty:
        return None
    known = known.assign(unsafe=known["unsafe"] / known["n"])
    shares = known.groupby(["model", "thinking", "attack"], sort=False)[[*OUTCOMES]].mean()
    bars = {
        cell: [(name, share, f"{name.replace('_', '-')}: {percent(row[name])}")
               for name in OUTCOMES if (share := row[name]) > 0]
        for cell, row in shares.to_dict("index").items()
    }  # fmt: skip
    columns = _unique(_pairs(known))
    order = [name for name in attack_order(measured) if name in set(known["attack"])]
    return {
        "columns": [label(*column) for column in columns],
        "rows": [(name, [bars.get((*column, name), []) for column in columns]) for name in order],
        "shown": [name for name in OUTCOMES if any(shares[name] > 0)],
    }


def attack_dots(measured: Measured) -> dict[str, Any] | None:
    """ASR with interval: one row per attack, one series per model, one view per dataset; None if
    nothing was scored."""
    scored = measured.attacks[measured.attacks["asr"].notna()]
    if scored.empty:
        return None
    names = [name for name in attack_order(measured) if name in set(scored["attack"])]
    pairs = _unique(_pairs(scored))
    frames = {
        str(name): frame
        for name, frame in measured.cells[measured.cells["asr"].notna()].groupby("dataset")
    }
    views = [_view(name, frame, names, pairs) for name, frame in frames.items()]
    if len(views) > 1:
        views.insert(0, _view(f"mean over {len(views)} datasets", scored, names, pairs))
    # the models with the highest ASR are shown first
    highest = scored.groupby(["model", "thinking"])["asr"].max()
    worst = sorted(pairs, key=lambda pair: -highest[pair])
    first = worst[: _SHOWN if len(names) <= 20 else _SHOWN_IN_LONG]
    series = [_series(label(*pair), worst.index(pair), pair in first) for pair in pairs]
    return {"rows": [visible(name) for name in names], "series": series, "views": views}


def _series(name: str, tone: int, shown: bool) -> dict[str, Any]:
    """`tone` is the index of the colour and the marker; low indices are the most distinct."""
    return {"name": visible(name), "tone": tone, "shown": shown}


def _view(
    name: str, frame: pd.DataFrame, attacks: list[str], pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    by_cell = {(r.model, r.thinking, r.attack): _point(r.asr, r) for r in rows(frame)}
    points = [[by_cell.get((*pair, attack)) for attack in attacks] for pair in pairs]
    return {"name": visible(name), "points": points}


def _point(rate: float, row: Any) -> list[Any]:
    """[value, low, high, n]."""
    return [round(float(rate), 5), round(float(row.low), 5), round(float(row.high), 5), int(row.n)]


def harmless_dots(measured: Measured) -> dict[str, Any] | None:
    """Over-refusal and utility on harmless prompts, one row per model; None if nothing was
    scored."""
    direct = {
        name: frame[frame["rate"].notna() & (frame["attack"] == "direct")]
        for name, frame in (
            ("over-refusal (harmless prompts refused)", measured.refusal),
            ("utility of answers to harmless prompts", measured.utility),
        )
    }
    direct = {name: frame for name, frame in direct.items() if len(frame)}
    pairs = _unique(pair for frame in direct.values() for pair in _pairs(frame))
    if not pairs:
        return None
    points = []
    for frame in direct.values():
        by_model = {(row.model, row.thinking): _point(row.rate, row) for row in rows(frame)}
        points.append([by_model.get(pair) for pair in pairs])
    series = [_series(name, tone, True) for tone, name in enumerate(direct)]
    names = [visible(label(*pair)) for pair in pairs]
    return {"rows": names, "series": series, "views": [{"name": "", "points": points}]}
