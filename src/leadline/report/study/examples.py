"""A few trials of each model and attack to read, with unsafe text taken out unless asked for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from ...analysis.sums import TRIALS, chosen
from ...store import Store
from ...text import percent, redact, shorten
from .findings import Measured, label, rows

_PAIRS = 300  # with more model x attack pairs than this the page shows one trial of each
_LONG, _SHORT = 600, 240  # characters shown of a text

# What to look for in a cell, and in which of its counts it is found.
_KINDS = {
    "unsafe": "p.harmful AND v.unsafe = 1",
    "unscored": "p.harmful AND v.unsafe IS NULL",
    "refused": "p.harmful AND v.unsafe = 0 AND v.refusal = 1",
    "safe": "p.harmful AND v.unsafe = 0 AND v.refusal IS NOT 1",
    "refused, though harmless": "NOT p.harmful AND v.refusal = 1",
}


@dataclass(frozen=True)
class Example:
    """One trial as the page shows it. `verdict` is a key of _KINDS; texts are already redacted."""

    verdict: str
    dataset: str
    prompt: str
    context: str
    prefix: str
    thought: str
    answer: str
    outcome: str
    score: float | None
    judge: str | None


@dataclass(frozen=True)
class Attack:
    """A model's examples of one attack under its name and rate."""

    name: str
    rate: str
    examples: list[Example]


def examples(
    store: Store, found: Measured, *, reveal: bool = False, judge: str | None = None
) -> dict[str, list[Attack]]:
    """By model, by attack: an unsafe trial, an unscored one, a refusal, ... where there are any."""
    best = _cells(found)
    few = len(best) > _PAIRS
    rate = {
        (row.model, row.thinking, row.attack): percent(row.asr)
        for row in rows(found.attacks[found.attacks["asr"].notna()])
    }
    shown: dict[str, list[Attack]] = defaultdict(list)
    for (model, thinking, attack), kinds in best.items():
        picked: list[Example] = []
        for kind, dataset in kinds.items():
            if picked and few:
                break
            cell = (model, thinking, dataset, attack)
            row = _trial(store, judge, cell, _KINDS[kind])
            if row:
                picked.append(_example(kind, dataset, row, reveal, _SHORT if few else _LONG))
        if picked:
            shown[label(model, thinking)].append(
                Attack(attack, rate.get((model, thinking, attack), ""), picked)
            )
    return shown


def _cells(found: Measured) -> dict[tuple[str, str, str], dict[str, str]]:
    """For each (model, thinking, attack) the dataset that has most trials of each kind, so that
    a look for one ends soon, and no look is taken where there is none."""
    most: dict[tuple[str, str, str], dict[str, tuple[float, str]]] = defaultdict(dict)
    for row in rows(found.cells):
        refused = 0.0 if row.refused != row.refused else row.refused * row.n
        safe = row.n - row.unsafe
        _more(most, row, {"unsafe": row.unsafe, "unscored": row.unscored})
        _more(most, row, {"refused": min(refused, safe), "safe": safe - min(refused, safe)})
    for row in rows(found.over_refusal):
        _more(most, row, {"refused, though harmless": row.refused})
    return {
        pair: {kind: kinds[kind][1] for kind in _KINDS if kind in kinds}
        for pair, kinds in most.items()
    }


def _more(most: Any, row: Any, counts: dict[str, float]) -> None:
    kinds = most[row.model, row.thinking, row.attack]
    for kind, count in counts.items():
        if count > kinds.get(kind, (0, ""))[0]:
            kinds[kind] = (count, row.dataset)


def _trial(
    store: Store, judge: str | None, cell: tuple[str, ...], condition: str
) -> tuple[Any, ...] | None:
    trials = store.query(
        f"{chosen(store, judge)} SELECT p.text, p.context, p.harmful, r.prefix, r.thought, "
        "r.answer, t.outcome, v.unsafe, v.score, (SELECT name FROM judges WHERE id = j.judge), "
        "(SELECT MAX(o.unsafe) FROM verdicts o WHERE o.cell = t.cell AND o.prompt = t.prompt "
        f"AND o.sample = t.sample) {TRIALS.replace('LEFT JOIN verdicts', _ANSWERED)} "
        "WHERE c.model = ? AND c.thinking = ? AND c.dataset = ? AND c.attack = ? "
        f"AND {condition} LIMIT 1",
        cell,
    )
    return trials[0] if trials else None


_ANSWERED = "JOIN responses r ON r.key = t.key LEFT JOIN verdicts"


def _example(kind: str, dataset: str, row: tuple[Any, ...], reveal: bool, most: int) -> Example:
    text, context, harmful, prefix, thought, answer, outcome, unsafe, score, judge, ever = row
    # What any judge found unsafe, or no judge could clear, is not shown; nor is a harmful
    # prompt's response prefix, whatever the verdict: it is the start of a harmful answer.
    hide = not reveal and bool(unsafe or ever or (harmful and unsafe is None))
    hide_prefix = not reveal and (hide or bool(harmful))

    def shown(text: str | None, hide: bool = False) -> str:
        return redact(text or "") if hide else shorten(text or "", most)

    return Example(
        kind, dataset, shown(text), shown(context), shown(prefix, hide_prefix),
        shown(thought, hide), shown(answer, hide), outcome, score, judge,
    )  # fmt: skip
