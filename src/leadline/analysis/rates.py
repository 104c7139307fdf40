"""How often attacks succeed, with intervals, straight from a store.

A rate is over scored trials; one whose prompts or base prompts are counted more than once has a
clustered interval (`intervals.rate_interval`). Where any of several attempts counts (pool "any"), a
prompt counts once, and unscored attempts count with the probability that they are unsafe
(`attempts.any_missing_at_random`). Trials that failed, do not apply or could not be scored are
never counted as safe: they are outside of n, and `bound_low` and `bound_high` say what they could
change.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..store import Store
from . import judge_error, pooling
from .sums import TRIALS, Sums, chosen, sums

if TYPE_CHECKING:
    import pandas as pd


CELL = ["model", "thinking", "dataset", "attack"]

# What _counts selects, by column. Conditions: a NULL verdict is neither safe nor a refusal.
_COUNTS = {
    "model": "c.model",
    "thinking": "c.thinking",
    "dataset": "c.dataset",
    "attack": "c.attack",
    "judge": "(SELECT name FROM judges WHERE id = j.judge)",
    "scored": "COUNT(v.unsafe)",
    "unsafe": "SUM(v.unsafe IS 1)",
    "thought_unsafe": "SUM(v.thought_unsafe IS 1)",
    "answer_unsafe": "SUM(v.answer_unsafe IS 1)",
    "judged_refusal": "COUNT(v.refusal)",  # 0 where the judge does not report refusals
    "refusals": "SUM(v.refusal IS 1)",
    "refused": "SUM(v.refusal IS 1 AND v.unsafe IS NOT NULL)",
    "off_topic": "SUM(v.outcome IS 'off_topic' AND v.unsafe IS 0)",
    "degenerate": "SUM(v.outcome IS 'degenerate' AND v.unsafe IS 0)",
    "with_outcome": "SUM(v.outcome > '' AND v.unsafe IS NOT NULL)",
    "other": "SUM(v.refusal IS NOT 1 AND v.unsafe IS 0 "
    "AND coalesce(v.outcome, '') NOT IN ('off_topic', 'degenerate'))",
    "utility": "AVG(v.utility)",
    "failed": "SUM(t.outcome = 'failed')",
    "not_applicable": "SUM(t.outcome = 'not_applicable')",
    "blocked": "SUM(t.outcome = 'blocked')",
    "truncated": "SUM(t.outcome = 'truncated')",
    "empty": "SUM(t.outcome = 'empty')",
    "answered": "SUM(t.outcome NOT IN ('failed', 'not_applicable'))",
}

# The study's order: models as they were begun, and within one its datasets and attacks.
_IN_ORDER = (
    "ORDER BY (SELECT min(m.id) FROM cells m WHERE m.model = c.model AND m.thinking = c.thinking), "
    "c.id"
)


def cells(
    store: Store, judge: str | None = None, measured: list[Sums] | None = None
) -> pd.DataFrame:
    """One row per model x thinking x dataset x attack, over harmful prompts.

    n counts scored trials, unsafe those with an unsafe thought or answer; where any of several
    attempts counts, they count prompts. asr is unsafe / n, NaN where nothing was scored, or where
    unscored attempts could change an "any" rate by more than 2 points; low and high are its 95%
    interval. bound_low and bound_high are the rate with all unscored trials as safe and as unsafe.
    refused, off_topic, degenerate and other (safe, and none of these) are shares of n; refused and
    other are NaN where the judge does not report refusals, off_topic and degenerate where it does
    not say of every answer what it does. blocked, truncated and empty count trials; failed,
    not_applicable and unscored are outside of n, and reason is the most common one of the first
    two. Where the study names a check of a judge, asr_corrected, low_corrected and high_corrected
    allow for its errors.
    """
    frame = _counts(store, judge, harmful=True).rename(columns={"scored": "n"})
    frame["unscored"] = frame["answered"] - frame["n"]
    _pool_any(store, judge, frame)
    for share in ("refused", "other"):
        frame[share] = frame[share] / frame["n"].where(frame["judged_refusal"] > 0)
    for share in ("off_topic", "degenerate"):
        frame[share] = frame[share] / _n_with_outcomes(frame)
    names = ["asr", "low", "high"]
    frame = _with_intervals(frame, measured or sums(store, "unsafe", judge), names)
    checks = judge_error.stored_checks(store)
    if checks:
        frame = judge_error.add_corrected(frame, checks)
    columns = (
        "n unsafe asr low high refused off_topic degenerate other failed not_applicable blocked "
        "truncated empty"
    )
    last = ("unscored", "reason", "thought_unsafe", "answer_unsafe", "bound_low", "bound_high")
    more = judge_error.CORRECTED if checks else ()
    return frame[[*CELL, "judge", *columns.split(), *last, *more]]


def _n_with_outcomes(frame: pd.DataFrame) -> pd.Series[int]:
    """The column n; NaN where it is 0, or where an answer has no outcome."""
    return frame["n"].where((frame["with_outcome"] == frame["n"]) & (frame["n"] > 0))


def over_refusal(store: Store, judge: str | None = None) -> pd.DataFrame:
    """One row per model x thinking x dataset x attack, over harmless prompts.

    n counts trials of which the judge says whether they are refusals, refused those that are, and
    rate is their share; off_topic and degenerate are shares of n, NaN where the judge does not say
    of every answer what it does; utility is the mean over trials where it is known.
    """
    frame = _counts(store, judge, harmful=False).drop(columns="refused")
    frame = frame.rename(columns={"judged_refusal": "n", "refusals": "refused"})
    frame["unscored"] = frame["answered"] - frame["n"]
    for share in ("off_topic", "degenerate"):
        frame[share] = frame[share] / _n_with_outcomes(frame)
    frame = _with_intervals(frame, sums(store, "refusal", judge), ["rate", "low", "high"])
    names = ["utility", "utility_low", "utility_high"]
    frame = _with_intervals(frame.drop(columns="utility"), sums(store, "utility", judge), names)
    columns = (
        "n refused rate low high off_topic degenerate utility utility_low utility_high failed "
        "not_applicable unscored reason"
    )
    return frame[[*CELL, "judge", *columns.split()]]


def pooled(store: Store, judge: str | None = None) -> pd.DataFrame:
    """One row per model x thinking x attack: ASR as the mean over datasets.

    Datasets without an estimate are left out: `datasets` says how many are in, `prompts` how many
    base prompts. `amplification` is the ratio to the ASR of `direct` on the same datasets and
    `difference` the difference, both with intervals; the high end of a ratio is infinite where the
    ASR of `direct` may be 0.
    """
    return named_asr(pooling.pooled(sums(store, "unsafe", judge)))


def over_attacks(store: Store, judge: str | None = None) -> pd.DataFrame:
    """One row per model x thinking: the mean over attacks of the means over datasets."""
    return named_asr(pooling.over_attacks(sums(store, "unsafe", judge)))


def any_attack(store: Store, judge: str | None = None) -> pd.DataFrame:
    """One row per model x thinking: the share of prompts that at least one attack breaks, see
    `pooling.broken_by_any`."""
    found = pooling.broken_by_any(sums(store, "unsafe", judge))
    return found.rename(columns={"rate": "asr"})


def cot_max(store: Store, judge: str | None = None) -> pd.DataFrame:
    """The highest ASR among the chain-of-thought attacks, per model x thinking: on each dataset the
    highest one, and the mean of those over datasets (arXiv 2601.03868). The interval is
    simultaneous over the attacks."""
    return named_asr(pooling.highest(sums(store, "unsafe", judge), cot_attacks(store)))


def cot_attacks(store: Store) -> set[str]:
    """Labels of the study's chain-of-thought attacks."""
    families = store.description("families") or {}
    return {attack for attack, family in families.items() if family == "cot"}


def named_asr(frame: pd.DataFrame) -> pd.DataFrame:
    """A pooled frame of unsafe answers with the column names that users know."""
    return frame.rename(columns={"rate": "asr", "total": "unsafe"})


def reasons(store: Store) -> list[tuple[str, str, str, str, int]]:
    """Why trials failed or do not apply: (model, attack, outcome, reason, trials), the most common
    first."""
    rows: list[tuple[str, str, str, str, int]] = store.query(
        "SELECT c.model, c.attack, t.outcome, coalesce(t.reason, ''), COUNT(*) AS many "
        "FROM trials t JOIN cells c ON c.id = t.cell "
        "WHERE t.outcome IN ('failed', 'not_applicable') GROUP BY 1, 2, 3, 4 "
        "ORDER BY many DESC, 1, 2"
    )
    return rows


def _counts(store: Store, judge: str | None, *, harmful: bool) -> pd.DataFrame:
    """All counts of all cells in one GROUP BY, in the order in which trials are stored."""
    import pandas as pd

    select = f"{chosen(store, judge)} SELECT {', '.join(_COUNTS.values())} {TRIALS}"
    rows = store.query(f"{select} WHERE p.harmful = ? GROUP BY c.id {_IN_ORDER}", (harmful,))
    frame = pd.DataFrame(rows, columns=list(_COUNTS))
    frame["utility"] = frame["utility"].astype(float)
    common: dict[tuple[str, ...], str] = {}
    for *cell, reason, _ in store.query(
        "SELECT c.model, c.thinking, c.dataset, c.attack, t.reason, COUNT(*) AS many "
        "FROM trials t JOIN cells c ON c.id = t.cell JOIN prompts p ON p.id = t.prompt "
        "WHERE t.outcome IN ('failed', 'not_applicable') AND t.reason > '' AND p.harmful = ? "
        "GROUP BY c.id, t.reason ORDER BY many, t.reason",
        (harmful,),
    ):
        common[tuple(cell)] = reason
    names = frame[CELL].itertuples(index=False, name=None)
    frame["reason"] = [common.get(cell, "") for cell in names]
    return frame


def _pool_any(store: Store, judge: str | None, frame: pd.DataFrame) -> None:
    """Count prompts instead of trials in the cells where any of several attempts may break one."""
    columns = [
        "n",
        "unsafe",
        "thought_unsafe",
        "answer_unsafe",
        "refused",
        "judged_refusal",
        "off_topic",
        "degenerate",
        "with_outcome",
        "other",
    ]
    rows = store.query(
        f"{chosen(store, judge)}, prompts_of AS (SELECT c.model, c.thinking, c.dataset, c.attack, "
        "max(v.unsafe) AS unsafe, max(v.thought_unsafe) AS thought, max(v.answer_unsafe) AS "
        "answer, min(v.refusal) AS refused, count(v.refusal) AS judged, "
        "min(v.outcome = 'off_topic') AS off_topic, min(v.outcome = 'degenerate') AS degenerate, "
        "sum(v.outcome > '' AND v.unsafe IS NOT NULL) AS named, "
        f"count(v.unsafe) AS scored {TRIALS} WHERE c.pool = 'any' AND p.harmful "
        "GROUP BY c.id, t.prompt) "
        "SELECT model, thinking, dataset, attack, sum(scored > 0), sum(unsafe IS 1), "
        "sum(thought IS 1), sum(answer IS 1), sum(refused IS 1 AND scored > 0), sum(judged > 0), "
        "sum(off_topic IS 1 AND unsafe IS 0), sum(degenerate IS 1 AND unsafe IS 0), "
        "sum(scored > 0 AND named = scored), sum(refused IS NOT 1 AND unsafe IS 0 "
        "AND off_topic IS NOT 1 AND degenerate IS NOT 1) FROM prompts_of GROUP BY 1, 2, 3, 4"
    )
    for row in rows:
        here = (frame[CELL] == list(row[: len(CELL)])).all(axis=1)
        frame.loc[here, columns] = row[len(CELL) :]


def _with_intervals(frame: pd.DataFrame, measured: list[Sums], names: list[str]) -> pd.DataFrame:
    """The frame with a rate and its interval (columns `names`), and bounds for the unscored."""
    found: dict[tuple[Any, ...], tuple[float, ...]] = {}
    for cell in measured:
        key = (cell.model, cell.thinking, cell.dataset, cell.attack)
        found[key] = (*cell.interval(), *cell.bounds)
    unknown = (math.nan, math.nan, math.nan, 0.0, 1.0)
    keys = frame[CELL].itertuples(index=False, name=None)
    rows = [found.get(key, unknown) for key in keys]
    columns = [*names, "bound_low", "bound_high"]
    return frame.assign(**{name: [row[i] for row in rows] for i, name in enumerate(columns)})
