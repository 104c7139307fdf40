"""What a study found: its frames, a few sentences in plain words, and the machine's summary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ...analysis import rates
from ...analysis.intervals import pool, resample, worst
from ...store import Store
from ...text import percent, plain, span, visible
from ...version import __version__

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measured:
    """A store's numbers as the report shows them.

    `cells` and `over_refusal` as in `rates`; `attacks` and `models` pooled per attack and over
    attacks; `cot_max` the greatest over chain-of-thought attacks; `refusal` and `utility` pooled
    over the harmless datasets; `prompts` how many harmful prompts have a scored answer.
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
    """The report for machines: what summary.json holds. A rate that is not known is None."""
    return summarise(store, measure(store, judge))


def summarise(store: Store, found: Measured) -> dict[str, Any]:
    frames = {"cells": found.cells, "pooled": found.attacks, "over_refusal": found.over_refusal}
    frames["cot_max"] = found.cot_max
    tables = {name: frame.to_dict("records") for name, frame in frames.items()}
    summary: dict[str, Any] = plain(
        {
            "leadline": __version__,
            "study": (store.description("study") or {}).get("name", ""),
            "generated": datetime.now(UTC).isoformat(timespec="seconds"),
            "findings": findings(found),
            **tables,
        }
    )
    return summary


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """Its rows as named tuples."""
    return iter(frame.itertuples(index=False))


def label(model: str, thinking: str) -> str:
    return model if thinking in ("", "default") else f"{model} (thinking {thinking})"


def findings(found: Measured) -> list[str]:
    """Some three sentences. The first says what was measured on what, and the headline, to a
    reader who knows none of our words."""
    scored = found.attacks[found.attacks["n"] > 0]
    if scored.empty:
        first, last = ["No answer to a harmful prompt has been judged yet."], list[str]()
    else:
        best, spread = _best(scored), _spread(scored)
        first, last = (best, spread) if best else (spread, [])
        first = [_headline(found, scored), *first]
    return [visible(said) for said in (*first, *_cost(found), *last, *_missing(found))]


def _worst(scored: pd.DataFrame) -> Any:
    """The row of the attack that succeeds most; of equals the surest, then the first by name."""
    order = scored.sort_values(["attack"], kind="stable", ascending=False)
    return order.sort_values(["asr", "low"], kind="stable").iloc[-1]


def _shallowest(scored: pd.DataFrame) -> Any:
    """The worst row of the model that an attack changes most from what it says when asked plainly;
    where nobody was asked plainly, the worst of all."""

    def rise(row: Any) -> float:
        plain_row = _plainly(scored, row)
        return -1.0 if plain_row is None else float(row.asr - plain_row.asr)

    tops = [_worst(rows) for _, rows in scored.groupby(["model", "thinking"])]
    return max(tops, key=lambda row: (rise(row), row.asr))


def _rate(row: Any) -> str:
    return f"{percent(row.asr)} {span(row.low, row.high)}"


def _plainly(scored: pd.DataFrame, row: Any) -> Any | None:
    """The row of the same model asked plainly."""
    same = (scored["model"] == row.model) & (scored["thinking"] == row.thinking)
    direct = scored[same & (scored["attack"] == "direct")]
    return None if direct.empty else direct.iloc[0]


def _headline(found: Measured, scored: pd.DataFrame) -> str:
    worst = _shallowest(scored)
    who = label(worst.model, worst.thinking)
    several = scored["model"].nunique()
    prompts = f"{found.prompts:,} prompt{'s' * (found.prompts != 1)} that"
    if several == 1:
        start, who = f"{who}, a language model, was asked {prompts} it should refuse: ", "it"
    else:
        start = f"{several} language models were asked {prompts} they should refuse: "
    plain_row = _plainly(scored, worst)
    said = []
    if plain_row is not None:
        refused = _refused(found, plain_row)
        head = f"{who} refuses {percent(refused)} and " if refused is not None else f"{who} "
        said = [f"asked plainly, {head}gives an unsafe answer to {_rate(plain_row)} of them"]
    attacks = scored.loc[scored["attack"] != "direct", "attack"].nunique()
    if worst.attack != "direct":
        name = f"{worst.attack}, the strongest of {attacks} attacks"
        under = f"under {name}" if attacks > 1 else f"under the attack {worst.attack}"
        gives = "to" if said else f"{who} gives an unsafe answer to"
        said.append(f"{under}, {gives} {_rate(worst)}")
    elif attacks:
        said.append("no attack gets more")
    return start + "; ".join(said) + "."


def _refused(found: Measured, row: Any) -> float | None:
    """Share refused, as the mean over datasets; None where the judge does not tell."""
    cells = found.cells
    same = (cells["model"] == row.model) & (cells["thinking"] == row.thinking)
    share = cells.loc[same & (cells["attack"] == row.attack), "refused"].mean()
    return float(share) if share == share else None


def _best(scored: pd.DataFrame) -> list[str]:
    """Who held best."""
    tops = [_worst(rows) for _, rows in scored.groupby(["model", "thinking"])]
    if len(tops) < 2:
        return []
    best = min(tops, key=lambda row: (row.asr, row.high))
    who = label(best.model, best.thinking)
    if best.attack == "direct":
        return [f"{who} held best: {_rate(best)} of its answers were unsafe."]
    return [
        f"{who} held best: the attack that got most from it, {best.attack}, got unsafe answers to "
        f"{_rate(best)}."
    ]


def _spread(scored: pd.DataFrame) -> list[str]:
    """How much the attack of the headline adds."""
    worst = _shallowest(scored)
    attacks = scored[scored["attack"] != "direct"]
    who = label(worst.model, worst.thinking)
    if worst.amplification == worst.amplification:
        ends = [worst.amplification_low, worst.amplification_high]
        upper = f"{ends[1]:.1f}" if ends[1] < 1000 else "no limit"
        return [
            f"{worst.attack} makes unsafe answers {worst.amplification:.1f} times as frequent as "
            f"asking {who} plainly [{ends[0]:.1f}, {upper}]."
        ]
    if not len(attacks) or worst.attack == "direct":
        return []
    mine = attacks[(attacks["model"] == worst.model) & (attacks["thinking"] == worst.thinking)]
    half = int((mine["asr"] > 0.5).sum())
    return [
        f"{half} of {len(mine)} attacks get unsafe answers from {who} to more than half of the "
        "prompts."
    ]


def _cost(found: Measured) -> list[str]:
    """What the safety costs on harmless prompts, for the models that pay most."""
    told = found.refusal[(found.refusal["n"] > 0) & (found.refusal["attack"] == "direct")]
    if told.empty:
        return []
    row = told.sort_values("rate", kind="stable").iloc[-1]
    if row.rate == 0:
        said = f"No harmless prompt is refused {span(row.low, row.high)}"
    else:
        most = "refuses most" if len(told) > 1 else "refuses"
        who = label(row.model, row.thinking)
        said = f"Of the harmless prompts, {who} {most}: {percent(row.rate)} "
        said += span(row.low, row.high)
    known = found.utility[(found.utility["n"] > 0) & (found.utility["attack"] == "direct")]
    if len(known):
        u = known.sort_values("rate", kind="stable").iloc[0]
        least = f"the least useful answers are those of {label(u.model, u.thinking)}: utility"
        said += f"; {least if len(known) > 1 and u.rate < 1 else 'the utility of the answers is'}"
        said += f" {percent(u.rate)} {span(u.low, u.high)}"
    return [said + "."]


def _missing(found: Measured) -> list[str]:
    columns = ["failed", "not_applicable", "unscored"]
    counts = found.cells[columns].sum() + found.over_refusal[columns].sum()
    names = ["failed", "are not applicable", "could not be scored"]
    parts = [f"{int(many):,} {name}" for name, many in zip(names, counts, strict=True) if many]
    if not parts:
        return []
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [f"Of the trials, {listed}; none of these is counted as safe."]
