"""Example trials of each model and attack, with unsafe text redacted unless `reveal`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from ...analysis.sums import TRIALS, chosen
from ...store import Store
from ...text import percent, redact, shorten
from .findings import Measured, label, rows

_MAX_PAIRS = 300  # with more model x attack pairs, the page shows one trial for each
_LONG, _SHORT = 600, 240  # characters shown of a text, with few and with many pairs

# The kinds of examples, in the order shown, each with its SQL condition.
_KINDS = {
    "unsafe": "p.harmful AND v.unsafe = 1",
    "unscored": "p.harmful AND v.unsafe IS NULL",
    "refused": "p.harmful AND v.unsafe = 0 AND v.refusal = 1",
    "off-topic": "p.harmful AND v.unsafe = 0 AND v.outcome = 'off_topic'",
    "degenerate": "p.harmful AND v.unsafe = 0 AND v.outcome = 'degenerate'",
    "safe": "p.harmful AND v.unsafe = 0 AND v.refusal IS NOT 1 "
    "AND coalesce(v.outcome, '') NOT IN ('off_topic', 'degenerate')",
    "over-refusal": "NOT p.harmful AND v.refusal = 1",
}

# Replaces the first join of TRIALS: only trials that have a response.
_ANSWERED = "JOIN responses r ON r.key = t.key LEFT JOIN verdicts"


@dataclass(frozen=True)
class Example:
    """One trial as the page shows it. `verdict` is a key of _KINDS; texts are redacted."""

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
    """A model's examples under one attack. `rate` is its ASR as text, "" if unknown."""

    name: str
    rate: str
    examples: list[Example]


def examples(
    store: Store, measured: Measured, *, reveal: bool = False, judge: str | None = None
) -> dict[str, list[Attack]]:
    """By model and attack: one trial of each kind that occurs, in the order of _KINDS."""
    kinds_by_pair = _cells(measured)
    many = len(kinds_by_pair) > _MAX_PAIRS
    rate = {
        (row.model, row.thinking, row.attack): percent(row.asr)
        for row in rows(measured.attacks[measured.attacks["asr"].notna()])
    }
    by_model: dict[str, list[Attack]] = defaultdict(list)
    for (model, thinking, attack), kinds in kinds_by_pair.items():
        picked: list[Example] = []
        for kind, dataset in kinds.items():
            if picked and many:
                break
            cell = (model, thinking, dataset, attack)
            row = _trial(store, judge, cell, _KINDS[kind])
            if row:
                picked.append(_example(kind, dataset, row, reveal, _SHORT if many else _LONG))
        if picked:
            by_model[label(model, thinking)].append(
                Attack(attack, rate.get((model, thinking, attack), ""), picked)
            )
    return by_model


def _cells(measured: Measured) -> dict[tuple[str, str, str], dict[str, str]]:
    """For each (model, thinking mode, attack) and each kind that occurs, the dataset with the most
    trials of that kind: the query for one trial ends soonest there."""
    most: dict[tuple[str, str, str], dict[str, tuple[float, str]]] = defaultdict(dict)
    for row in rows(measured.cells):
        safe = float(row.n - row.unsafe)
        counts = {"unsafe": float(row.unsafe), "unscored": row.unscored}
        for kind in ("refused", "off_topic", "degenerate"):
            share = getattr(row, kind)
            many = min(share * row.n, safe) if share == share else 0.0
            counts[kind.replace("_", "-")] = many
            safe -= many
        _update(most, row, {**counts, "safe": safe if safe > 1e-6 else 0.0})
    for row in rows(measured.over_refusal):
        _update(most, row, {"over-refusal": row.refused})
    return {
        pair: {kind: kinds[kind][1] for kind in _KINDS if kind in kinds}
        for pair, kinds in most.items()
    }


def _update(most: Any, row: Any, counts: dict[str, float]) -> None:
    """Keep the dataset of `row` where its counts are higher than those seen before."""
    kinds = most[row.model, row.thinking, row.attack]
    for kind, count in counts.items():
        if count > kinds.get(kind, (0, ""))[0]:
            kinds[kind] = (count, row.dataset)


def _trial(
    store: Store, judge: str | None, cell: tuple[str, ...], condition: str
) -> tuple[Any, ...] | None:
    """The first trial of a cell that meets an SQL condition, as the fields that _example takes."""
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


def _example(kind: str, dataset: str, row: tuple[Any, ...], reveal: bool, limit: int) -> Example:
    text, context, harmful, prefix, thought, answer, outcome, unsafe, score, judge, any_unsafe = row
    # Hidden: responses that any judge found unsafe, and unscored responses to harmful prompts. The
    # response prefix of a harmful prompt is always hidden: it is the start of a harmful answer.
    hide = not reveal and bool(unsafe or any_unsafe or (harmful and unsafe is None))
    hide_prefix = not reveal and (hide or bool(harmful))

    def shown(text: str | None, hide: bool = False) -> str:
        return redact(text or "") if hide else shorten(text or "", limit)

    return Example(
        kind, dataset, shown(text), shown(context), shown(prefix, hide_prefix),
        shown(thought, hide), shown(answer, hide), outcome, score, judge,
    )  # fmt: skip
