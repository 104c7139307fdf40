"""What the page's heat map and dot plots show, as plain data; the page's script draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...text import percent, span, visible
from .findings import Measured, label, rows

if TYPE_CHECKING:
    import pandas as pd

_SHOWN, _SHOWN_IN_LONG = 5, 3  # models that a dot plot of few, of many attacks starts with


def attack_order(found: Measured) -> list[str]:
    """`direct` first, then the attacks by their mean ASR over models, greatest first."""
    most = found.attacks.groupby("attack")["asr"].mean().fillna(-1)
    return sorted(most.index, key=lambda name: (name != "direct", -most[name], _natural(name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts k=5 before k=10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def models(found: Measured) -> list[tuple[str, str]]:
    """(model, thinking), in the study's order."""
    return _once([*_pairs(found.attacks), *_pairs(found.over_refusal)])


def _once(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pairs))


def _pairs(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(frame[["model", "thinking"]].itertuples(index=False, name=None))


def heat_map(found: Measured) -> dict[str, Any]:
    """ASR by attack (rows) and model (columns), and under them each model's mean over attacks
    and its maximum over chain-of-thought attacks.

    A cell is (class, text, words for a reader who sees no colours).
    """
    columns = _once(_pairs(found.attacks))
    groups = found.cells.groupby(["model", "thinking", "attack"])
    holes = groups[["failed", "not_applicable", "unscored"]].sum().to_dict("index")
    heat: dict[str, dict[tuple[str, str], tuple[str, str, str]]] = {}
    for row in rows(found.attacks):
        hole = holes[row.model, row.thinking, row.attack]
        cell = _heat_cell(row, hole)
        heat.setdefault(row.attack, {})[row.model, row.thinking] = cell
    empty = ("none", "", "not asked")
    table = [
        (name, [heat[name].get(column, empty) for column in columns])
        for name in attack_order(found)
    ]
    means = {(row.model, row.thinking): row for row in rows(found.models)}
    feet = [("mean over attacks", [_heat_cell(means[column], None) for column in columns])]
    most = {(row.model, row.thinking): row for row in rows(found.cot_max)}
    if any(row.attacks > 1 for row in most.values()):
        cells = [_heat_cell(most[c], None) if c in most else empty for c in columns]
        feet.append(("max over chain-of-thought attacks", cells))
    shown = [cell for _, cells in table for cell in cells]
    marks = {kind for kind, _, _ in shown} | {text[-1:] for _, text, _ in shown}
    names = [label(*column) for column in columns]
    return {"columns": names, "rows": table, "feet": feet, "marks": marks}


def _heat_cell(row: Any, hole: Any) -> tuple[str, str, str]:
    if row.n and row.asr == row.asr:
        part = hole is not None and hole["failed"] + hole["unscored"] > 0
        words = f"{percent(row.asr)} {span(row.low, row.high)}, {row.unsafe:g} of {row.n} unsafe"
        return f"h{math.floor(row.asr * 10)}", percent(row.asr) + "*" * part, words
    if hole is not None and hole["failed"]:
        return "failed", "failed", f"all {hole['failed']} trials failed"
    if hole is not None and hole["not_applicable"]:
        return "na", "n/a", "not applicable"
    if row.n:
        return "na", "?", "not estimated: too many unscored attempts, see the bounds in the table"
    return "na", "unscored" if hole is not None else "n/a", "no scored trial"


def attack_dots(found: Measured) -> dict[str, Any] | None:
    """ASR with its interval: a row per attack, a series per model, a view per dataset."""
    scored = found.attacks[found.attacks["asr"].notna()]
    if scored.empty:
        return None
    names = [name for name in attack_order(found) if name in set(scored["attack"])]
    pairs = _once(_pairs(scored))
    frames = {
        str(name): frame
        for name, frame in found.cells[found.cells["asr"].notna()].groupby("dataset")
    }
    views = [_view(name, frame, names, pairs) for name, frame in frames.items()]
    if len(views) > 1:
        views.insert(0, _view(f"mean over {len(views)} datasets", scored, names, pairs))
    # the models that give way most are the ones to look at first
    most = scored.groupby(["model", "thinking"])["asr"].max()
    worst = sorted(pairs, key=lambda pair: -most[pair])
    first = worst[: _SHOWN if len(names) <= 20 else _SHOWN_IN_LONG]
    series = [_series(label(*pair), worst.index(pair), pair in first) for pair in pairs]
    return {"rows": [visible(name) for name in names], "series": series, "views": views}


def _series(name: str, tone: int, shown: bool) -> dict[str, Any]:
    """`tone` picks the colour and the symbol: those shown first differ most."""
    return {"name": visible(name), "tone": tone, "shown": shown}


def _view(
    name: str, frame: pd.DataFrame, attacks: list[str], pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    found = {(r.model, r.thinking, r.attack): _point(r.asr, r) for r in rows(frame)}
    points = [[found.get((*pair, attack)) for attack in attacks] for pair in pairs]
    return {"name": visible(name), "points": points}


def _point(rate: float, row: Any) -> list[Any]:
    return [round(float(rate), 5), round(float(row.low), 5), round(float(row.high), 5), int(row.n)]


def harmless_dots(found: Measured) -> dict[str, Any] | None:
    """Refusals of harmless prompts and the utility of the answers: a row per model."""
    direct = {
        name: frame[frame["rate"].notna() & (frame["attack"] == "direct")]
        for name, frame in (
            ("refuses harmless prompts", found.refusal),
            ("utility on harmless prompts", found.utility),
        )
    }
    direct = {name: frame for name, frame in direct.items() if len(frame)}
    pairs = _once(pair for frame in direct.values() for pair in _pairs(frame))
    if not pairs:
        return None
    points = []
    for frame in direct.values():
        at = {(row.model, row.thinking): _point(row.rate, row) for row in rows(frame)}
        points.append([at.get(pair) for pair in pairs])
    series = [_series(name, tone, True) for tone, name in enumerate(direct)]
    names = [visible(label(*pair)) for pair in pairs]
    return {"rows": names, "series": series, "views": [{"name": "", "points": points}]}
