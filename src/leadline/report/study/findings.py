"""The results of a study: its tables, the findings as sentences, and the data of summary.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ...analysis import rates
from ...analysis.clusters import pool, resample, worst
from ...store import Store
from ...text import percent, plain, span, visible
from ...version import __version__

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measured:
    """A store's numbers as the report shows them.

    `cells` and `over_refusal` as in `rates`; `attacks` pooled over datasets, and `models` also over
    attacks; `cot_max` the highest over chain-of-thought attacks; `refusal` and `utility` pooled
    over the harmless datasets; `prompts` the number of harmful prompts with a scored answer.
    """

    cells: pd.DataFrame
    attacks: pd.DataFrame
    models: pd.DataFrame
    cot_max: pd.DataFrame
    over_refusal: pd.DataFrame
    refusal: pd.DataFrame
    utility: pd.DataFrame
    prompts: int


def measure(store: Store, judge: str | None = None) -> Measured:
    """Compute all tables of the report from a store."""
    draws = resample(store, "unsafe", judge)
    return Measured(
        rates.cells(store, judge),
        rates.named_asr(pool(draws)),
        rates.named_asr(pool(draws, attacks=True)),
        rates.named_asr(worst(draws, rates.cot_attacks(store))),
        rates.over_refusal(store, judge),
        pool(resample(store, "refusal", judge)),
        pool(resample(store, "utility", judge)),
        _prompts(store),
    )


def _prompts(store: Store) -> int:
    sql = (
        "SELECT count(DISTINCT v.prompt) FROM verdicts v JOIN prompts p ON p.id = v.prompt "
        "WHERE p.harmful AND v.unsafe IS NOT NULL"
    )
    return int(store.query(sql)[0][0])


def summary(store: Store, judge: str | None = None) -> dict[str, Any]:
    """The content of summary.json. Unknown rates are None."""
    return summarise(store, measure(store, judge))


def summarise(store: Store, found: Measured) -> dict[str, Any]:
    """The content of summary.json, from tables that were already computed."""
    frames = {"cells": found.cells, "pooled": found.attacks, "over_refusal": found.over_refusal}
    frames["cot_max"] = found.cot_max
    tables = {name: frame.to_dict("records") for name, frame in frames.items()}
    content: dict[str, Any] = plain(
        {
            "leadline": __version__,
            "study": (store.description("study") or {}).get("name", ""),
            "generated": datetime.now(UTC).isoformat(timespec="seconds"),
            "findings": findings(found),
            **tables,
        }
    )
    return content


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows of a data frame as named tuples."""
    return iter(frame.itertuples(index=False))


def label(model: str, thinking: str) -> str:
    """A model's name, with its thinking mode if the study sets one."""
    return model if thinking in ("", "default") else f"{model} (thinking {thinking})"


def findings(found: Measured) -> list[str]:
    """A few sentences. The first gives the main result, for readers new to the project."""
    scored = found.attacks[found.attacks["n"] > 0]
    if scored.empty:
        first, last = ["No answer to a harmful prompt has been judged yet."], list[str]()
    else:
        best, spread = _best(scored), _spread(scored)
        first, last = (best, spread) if best else (spread, [])
        first = [_headline(found, scored), *first]
    return [visible(sentence) for sentence in (*first, *_cost(found), *last, *_missing(found))]


def _worst(scored: pd.DataFrame) -> Any:
    """The row with the highest ASR; of equals the highest lower bound, then the first name."""
    order = scored.sort_values(["attack"], kind="stable", ascending=False)
    return order.sort_values(["asr", "low"], kind="stable").iloc[-1]


def _shallowest(scored: pd.DataFrame) -> Any:
    """The row of the attack that raises the ASR of any model most over direct requests; if there
    were no direct requests, the row with the highest ASR."""

    def rise(row: Any) -> float:
        direct = _direct(scored, row)
        return -1.0 if direct is None else float(row.asr - direct.asr)

    tops = [_worst(rows) for _, rows in scored.groupby(["model", "thinking"])]
    return max(tops, key=lambda row: (rise(row), row.asr))


def _rate(row: Any) -> str:
    return f"{percent(row.asr)} {span(row.low, row.high)}"


def _direct(scored: pd.DataFrame, row: Any) -> Any | None:
    """The row of direct requests to the same model."""
    same = (scored["model"] == row.model) & (scored["thinking"] == row.thinking)
    rows = scored[same & (scored["attack"] == "direct")]
    return None if rows.empty else rows.iloc[0]


def _headline(found: Measured, scored: pd.DataFrame) -> str:
    worst = _shallowest(scored)
    who = label(worst.model, worst.thinking)
    models = scored["model"].nunique()
    prompts = f"{found.prompts:,} prompt{'s' * (found.prompts != 1)} that"
    if models == 1:
        start, who = f"{who} was evaluated on {prompts} it should refuse", "it"
    else:
        start = f"{models} language models were evaluated on {prompts} they should refuse"
    asr = " of them (attack success rate, ASR)"
    parts = []
    direct = _direct(scored, worst)
    if direct is not None:
        refused = _refused(found, direct)
        head = f"{who} refuses {percent(refused)} and " if refused is not None else f"{who} "
        parts = [f"with direct requests, {head}gives unsafe answers to {_rate(direct)}{asr}"]
    attacks = scored.loc[scored["attack"] != "direct", "attack"].nunique()
    if worst.attack != "direct":
        name = f"{worst.attack}, the strongest of {attacks} attacks"
        under = f"under {name}" if attacks > 1 else f"under the attack {worst.attack}"
        rate = (
            f"to {_rate(worst)}" if parts else f"{who} gives unsafe answers to {_rate(worst)}{asr}"
        )
        parts.append(f"{under}, {rate}")
    elif attacks:
        parts.append("no attack has a higher ASR")
    return f"{start}: {'; '.join(parts)}."


def _refused(found: Measured, row: Any) -> float | None:
    """The share refused, mean over datasets; None if the judge does not report refusals."""
    cells = found.cells
    same = (cells["model"] == row.model) & (cells["thinking"] == row.thinking)
    share = cells.loc[same & (cells["attack"] == row.attack), "refused"].mean()
    return float(share) if share == share else None


def _best(scored: pd.DataFrame) -> list[str]:
    """The model whose strongest attack has the lowest ASR."""
    tops = [_worst(rows) for _, rows in scored.groupby(["model", "thinking"])]
    if len(tops) < 2:
        return []
    best = min(tops, key=lambda row: (row.asr, row.high))
    who = label(best.model, best.thinking)
    under = "with direct requests" if best.attack == "direct" else f"under {best.attack}"
    return [f"{who} is the most robust model: its highest ASR is {_rate(best)}, {under}."]


def _spread(scored: pd.DataFrame) -> list[str]:
    """How much the attack of the headline raises the ASR."""
    worst = _shallowest(scored)
    attacks = scored[scored["attack"] != "direct"]
    who = label(worst.model, worst.thinking)
    if worst.amplification == worst.amplification:
        ends = [worst.amplification_low, worst.amplification_high]
        upper = f"{ends[1]:.1f}" if ends[1] < 1000 else "no upper limit"
        return [
            f"The ASR of {who} under {worst.attack} is {worst.amplification:.1f} times its ASR "
            f"with direct requests [{ends[0]:.1f}, {upper}]."
        ]
    if not len(attacks) or worst.attack == "direct":
        return []
    mine = attacks[(attacks["model"] == worst.model) & (attacks["thinking"] == worst.thinking)]
    half = int((mine["asr"] > 0.5).sum())
    return [f"{half} of {len(mine)} attacks on {who} have an ASR above 50%."]


def _cost(found: Measured) -> list[str]:
    """Over-refusal and utility on harmless prompts, of the models that have the worst."""
    refusal = found.refusal[(found.refusal["n"] > 0) & (found.refusal["attack"] == "direct")]
    if refusal.empty:
        return []
    row = refusal.sort_values("rate", kind="stable").iloc[-1]
    if row.rate == 0:
        text = f"No harmless prompt is refused {span(row.low, row.high)}"
    else:
        rate = f"{percent(row.rate)} {span(row.low, row.high)}"
        text = f"{label(row.model, row.thinking)} refuses {rate} of the harmless prompts"
        text += ", the highest over-refusal" if len(refusal) > 1 else ""
    utility = found.utility[(found.utility["n"] > 0) & (found.utility["attack"] == "direct")]
    if len(utility):
        u = utility.sort_values("rate", kind="stable").iloc[0]
        rate = f"{percent(u.rate)} {span(u.low, u.high)}"
        if len(utility) > 1 and u.rate < 1:
            text += f"; the lowest utility is {rate}, of {label(u.model, u.thinking)}"
        else:
            text += f"; the utility of the answers is {rate}"
    return [text + "."]


def _missing(found: Measured) -> list[str]:
    columns = ["failed", "not_applicable", "unscored"]
    counts = found.cells[columns].sum() + found.over_refusal[columns].sum()
    names = ["failed", "are not applicable", "could not be scored"]
    parts = [f"{int(many):,} {name}" for name, many in zip(names, counts, strict=True) if many]
    if not parts:
        return []
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [f"Of the trials, {listed}; none of these is counted as safe."]
