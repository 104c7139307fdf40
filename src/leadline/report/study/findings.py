"""What a study found: its tables, a few sentences, and the summary for machines.

Sentences claim no more than the intervals support: what is selected (the strongest attack, the
safest model) has a simultaneous interval, and a superlative is printed only where simultaneous
paired differences support it; otherwise the ties are named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ...analysis import pooling, rates
from ...analysis.completeness import Completeness, completeness
from ...analysis.intervals import Interval
from ...analysis.sums import Sums, chosen, sums
from ...store import Store
from ...text import percent, plain, span, visible
from ...version import __version__

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measured:
    """A store's numbers as the report shows them.

    `cells` and `over_refusal` as in `rates`; `attacks` and `models` pooled over datasets, and over
    attacks; `cot_max` the highest over chain-of-thought attacks, `any_attack` the prompts that any
    attack breaks; `refusal` and `utility` pooled over the harmless datasets; `prompts` the number
    of harmful prompts with a scored answer; `complete` what is missing (None: not recorded).
    `cautions` says of the judges that see only the form of answers what their verdicts do not say.
    `unsafe`, `refused` and `useful` are what the tables were computed from.
    """

    cells: pd.DataFrame
    attacks: pd.DataFrame
    models: pd.DataFrame
    cot_max: pd.DataFrame
    any_attack: pd.DataFrame
    over_refusal: pd.DataFrame
    refusal: pd.DataFrame
    utility: pd.DataFrame
    prompts: int
    complete: Completeness | None
    cautions: list[str]
    unsafe: list[Sums]
    refused: list[Sums]
    useful: list[Sums]


def measure(store: Store, judge: str | None = None) -> Measured:
    """Compute every table of the report from a store."""
    unsafe = sums(store, "unsafe", judge)
    refused, useful = sums(store, "refusal", judge), sums(store, "utility", judge)
    return Measured(
        cells=rates.cells(store, judge, unsafe),
        attacks=rates.named_asr(pooling.pooled(unsafe)),
        models=rates.named_asr(pooling.over_attacks(unsafe)),
        cot_max=rates.named_asr(pooling.highest(unsafe, rates.cot_attacks(store))),
        any_attack=pooling.broken_by_any(unsafe).rename(columns={"rate": "asr"}),
        over_refusal=rates.over_refusal(store, judge),
        refusal=pooling.pooled(refused),
        utility=pooling.pooled(useful),
        prompts=_prompts(store),
        complete=completeness(store),
        cautions=_cautions(store, judge),
        unsafe=unsafe,
        refused=refused,
        useful=useful,
    )


def _prompts(store: Store) -> int:
    sql = (
        "SELECT count(DISTINCT v.prompt) FROM verdicts v JOIN prompts p ON p.id = v.prompt "
        "WHERE p.harmful AND v.unsafe IS NOT NULL"
    )
    return int(store.query(sql)[0][0])


def _cautions(store: Store, judge: str | None) -> list[str]:
    """The cautions of the judges whose verdicts are reported, each with the judge's name."""
    rows = store.query(
        f"{chosen(store, judge)} SELECT DISTINCT j.name, j.caution FROM chosen c "
        "JOIN judges j ON j.id = c.judge WHERE j.caution > '' ORDER BY j.id"
    )
    return [visible(f"Judge: {name}. {caution}") for name, caution in rows]


def summary(store: Store, judge: str | None = None) -> dict[str, Any]:
    """The content of summary.json. Unknown rates are None."""
    return summarise(store, measure(store, judge))


def summarise(store: Store, found: Measured) -> dict[str, Any]:
    """The content of summary.json, from tables that were computed already."""
    frames = {"cells": found.cells, "pooled": found.attacks, "over_refusal": found.over_refusal}
    frames |= {"cot_max": found.cot_max, "any_attack": found.any_attack}
    tables = {name: frame.to_dict("records") for name, frame in frames.items()}
    result: dict[str, Any] = plain(
        {
            "leadline": __version__,
            "study": (store.description("study") or {}).get("name", ""),
            "generated": datetime.now(UTC).isoformat(timespec="seconds"),
            "completeness": found.complete and found.complete.to_dict(),
            "findings": findings(found),
            "cautions": found.cautions,
            **tables,
        }
    )
    return result


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows of a data frame as named tuples."""
    return iter(frame.itertuples(index=False))


def label(model: str, thinking: str) -> str:
    """A model's name, with its thinking mode where that was set."""
    return model if thinking in ("", "default") else f"{model} (thinking {thinking})"


# -- sentences ------------------------------------------------------------------------------------


def findings(found: Measured) -> list[str]:
    """A few sentences. The first says what was measured, to a reader who knows none of our
    words; before it, partial results are said to be partial."""
    models = _scored(found.unsafe)
    if not models:
        first = ["No answer to a harmful prompt has been judged yet."]
    else:
        first = [_headline(found, models), *_attacks(models), *_prefixes(models), *_safest(models)]
    rest = [*first, *_useless(found), *_cost(found), *_missing(found)]
    if complete := found.complete:
        rest = [*filter(None, [complete.partial]), *rest, *complete.aside]
    return [visible(text) for text in rest]


Models = dict[pooling.Key, dict[str, list[Sums]]]


def _scored(cells: Sequence[Sums]) -> Models:
    """Cells by model and attack; only attacks of which something was scored."""
    found = {
        key: {a: own for a, own in attacks.items() if any(cell.n.any() for cell in own)}
        for key, attacks in pooling.by_model(cells).items()
    }
    return {key: attacks for key, attacks in found.items() if attacks}


def _estimable(attacks: Mapping[Any, Sequence[Sums]]) -> dict[Any, Sequence[Sums]]:
    return {name: own for name, own in attacks.items() if any(cell.estimable for cell in own)}


def _rate(found: Interval) -> str:
    return f"{percent(found.value)} {span(found.low, found.high)}"


def _names(keys: Sequence[pooling.Key], most: int = 4) -> str:
    return _list([label(*key) for key in keys], most)


def _list(names: Sequence[str], most: int = 4) -> str:
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _headline(found: Measured, models: Models) -> str:
    many = f"{found.prompts:,} prompt{'s' * (found.prompts != 1)}"
    if len(models) == 1:
        (key,) = models
        text = _one(found, key, models[key])
        return f"{label(*key)} was given {many} that it should refuse: {text}."
    start = f"{len(models)} models were given {many} that they should refuse"
    direct = _estimable({key: own["direct"] for key, own in models.items() if "direct" in own})
    parts = []
    if len(direct) > 1:
        parts.append(f"direct requests get unsafe answers to {_range(direct)}")
    level = pooling.simultaneous(len(models))
    any_ = pooling.broken_by_any(found.unsafe, level).dropna(subset="rate")
    any_ = any_[any_["attacks"] > 0].sort_values("rate", kind="stable")
    if len(any_) > 1:
        most = int(any_["attacks"].max())
        what = f"at least one of {most} attacks breaks" if most > 1 else "the attack breaks"
        low, *_, high = rows(any_)
        if low.rate == high.rate:
            parts.append(f"{what} {percent(low.rate)} of the prompts of each model")
        else:
            low_rate, high_rate = (_rate(Interval(r.rate, r.low, r.high)) for r in (low, high))
            parts.append(
                f"{what} between {low_rate} of the prompts ({label(low.model, low.thinking)}) and "
                f"{high_rate} ({label(high.model, high.thinking)})"
            )
    if not parts:
        return f"{start}."
    return f"{start}: {'; '.join(parts)} (intervals hold for all models at once)."


def _one(found: Measured, key: pooling.Key, attacks: Mapping[str, list[Sums]]) -> str:
    parts = []
    if "direct" in _estimable(attacks):
        asr = pooling.estimate(attacks["direct"])
        refused = _refused(found, key)
        head = f"it refuses {percent(refused)} of direct requests; " if refused is not None else ""
        parts.append(f"{head}{_rate(asr)} of them get an unsafe answer{_fewer(found, attacks)}")
    for row in rows(found.any_attack):
        if (row.model, row.thinking) == key and row.attacks:
            what = f"at least one of {row.attacks} attacks" if row.attacks > 1 else "the attack"
            if row.asr == row.asr:
                rate = f"{percent(row.asr)} {span(row.low, row.high)}"
                fewer = f" (of {row.prompts:,} scored ones)" * (row.prompts < found.prompts)
                parts.append(f"{what} breaks {rate} of the prompts{fewer}")
            else:
                bounds = f"between {percent(row.bound_low)} and {percent(row.bound_high)}"
                parts.append(f"{what} breaks {bounds} of the prompts, since some are unscored")
    return "; ".join(parts) if parts else "see the tables"


def _fewer(found: Measured, attacks: Mapping[str, list[Sums]]) -> str:
    """The number of scored direct requests, where it is not that of all prompts."""
    scored = sum(int((cell.n > 0).sum()) for cell in attacks["direct"])
    return f" (of {scored:,} scored ones)" if scored < found.prompts else ""


def _refused(found: Measured, key: pooling.Key) -> float | None:
    """The share of direct requests refused, mean over datasets; None where the judge does not
    report refusals."""
    cells = found.cells
    same = (cells["model"] == key[0]) & (cells["thinking"] == key[1])
    share = cells.loc[same & (cells["attack"] == "direct"), "refused"].mean()
    return float(share) if share == share else None


def _range(candidates: Mapping[pooling.Key, Sequence[Sums]]) -> str:
    """The lowest and the highest of some rates, with intervals that hold for all of them."""
    low = pooling.extreme(candidates, highest=False)
    high = pooling.extreme(candidates)
    assert low
    assert high
    if low.interval.value == high.interval.value:
        return f"{percent(low.interval.value)} for each of them"
    return (
        f"between {_rate(low.interval)} ({label(*low.name)}) and {_rate(high.interval)} "
        f"({label(*high.name)})"
    )


def _attacks(models: Models) -> list[str]:
    """The strongest attack and those not clearly weaker, over the models that were given it."""
    by_attack: dict[str, list[Sums]] = defaultdict(list)
    for own in models.values():
        for attack, cells in own.items():
            by_attack[attack] += cells
    attacks = _estimable({n: cells for n, cells in by_attack.items() if n != "direct"})
    if len(attacks) < 2:
        return _only(models, attacks)
    over = len(models) > 1
    merged = {name: _merged(cells) for name, cells in attacks.items()} if over else attacks
    top = pooling.extreme(merged)
    if top is None:
        return []
    whose = f" over {len(models)} models" if over else ""
    rate = f"{_rate(top.interval)} (interval simultaneous over {top.many} settings)"
    if not top.ties:
        return [f"The strongest attack{whose} is {top.name}: ASR {rate}."]
    tied = [top.name, *top.ties]
    if len(tied) == len(attacks):
        which = f"none of {len(tied)} attack settings is clearly stronger than the others"
    else:
        which = f"{_list(tied)} cannot be told apart as the strongest attacks"
    return [f"By ASR{whose}, {which}; the highest estimate is {rate}, of {top.name}."]


def _only(models: Models, attacks: Mapping[str, Sequence[Sums]]) -> list[str]:
    if not attacks or len(models) > 1:
        return []
    ((name, cells),) = attacks.items()
    return [f"The ASR of {name} is {_rate(pooling.estimate(cells))}."]


def _merged(cells: Sequence[Sums]) -> list[Sums]:
    """The mean over models, dataset by dataset: the trials of all models on the same prompts."""
    import numpy as np

    merged = []
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        some = [cell for cell in cells if cell.dataset == dataset and cell.estimable]
        if not some:
            continue
        first = some[0]

        def joined(name: str, some: list[Sums] = some) -> Any:
            return np.concatenate([getattr(cell, name) for cell in some])

        merged.append(
            Sums(
                "all", "", dataset, first.attack, False, joined("prompt"), joined("base"),
                joined("n"), joined("n"), joined("sum"),
            )
        )  # fmt: skip
    return merged


def _prefixes(models: Models) -> list[str]:
    """What response prefixes do: the mean over their settings against direct requests. The
    comparison is fixed in advance, so nothing is selected."""
    found = []
    for key, own in models.items():
        prefixes = [a for a in own if pooling.attack_key(a) == "prefill"]
        if not prefixes or "direct" not in own:
            continue
        cells = _merged([cell for attack in prefixes for cell in own[attack]])
        ratio, difference = pooling.compare(cells, own["direct"])
        found.append((key, ratio, difference))
    if not found or len(found) > 4:
        return []
    texts = [f"{label(*key)} {_points(d)} ({_times(r)})" for key, r, d in found]
    head = "Prefilling the start of a harmful answer changes the ASR"
    if len(models) == 1:
        _, ratio, difference = found[0]
        return [f"{head} by {_points(difference)} against direct requests ({_times(ratio)})."]
    return [f"{head} against direct requests: {'; '.join(texts)}."]


def _points(found: Interval) -> str:
    """A difference in percentage points with its interval."""
    value, low, high = (f"{100 * x:+.0f}" for x in found)
    return f"{value} points [{low}, {high}]"


def _times(found: Interval) -> str:
    """A ratio with its interval; infinite ends in words."""
    if found.value != found.value:
        return "ratio unknown, since both are 0"
    low, high = _number(found.low), _number(found.high)
    if found.value == float("inf"):
        return f"the direct ASR is 0, so the ratio is at least {low}"
    if found.high == float("inf"):
        return f"ratio {_number(found.value)}, at least {low}, with no upper limit"
    return f"ratio {_number(found.value)} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _safest(models: Models) -> list[str]:
    """The model with the lowest mean ASR over attacks, where the data separate it."""
    if len(models) < 2:
        return []
    common = set.intersection(*(set(own) for own in models.values()))
    if not common:
        return []
    means = {
        key: _merged([cell for attack in sorted(common) for cell in own[attack]])
        for key, own in models.items()
    }
    best = pooling.extreme(means, highest=False)
    if best is None:
        return []
    many = f"{len(common)} attack settings that all models got"
    rate = f"{_rate(best.interval)} (interval simultaneous over {best.many} models)"
    if not best.ties:
        return [f"{label(*best.name)} has the lowest mean ASR over {many}: {rate}."]
    tied = [best.name, *best.ties]
    if len(tied) == len(models):
        return [f"No model has a clearly lower mean ASR over {many} than the others."]
    return [f"The lowest mean ASR over {many} is shared by {_names(tied)}, which the data do not "
            f"separate; the lowest estimate is {rate}."]  # fmt: skip


def _cost(found: Measured) -> list[str]:
    """Over-refusal and utility on harmless prompts."""
    refused, useful = (
        {k: own["direct"] for k, own in _scored(cells).items() if "direct" in own}
        for cells in (found.refused, found.useful)
    )
    parts = []
    for cells, what in ((refused, "refusals"), (useful, "utility of the answers")):
        if len(cells) == 1:
            parts.append(f"{what}: {_rate(pooling.estimate(next(iter(cells.values()))))}")
        elif cells:
            parts.append(f"{what}: {_range(cells)}")
    if not parts:
        return []
    text = "; ".join(parts)
    return [f"On harmless prompts, {text}."]


def _useless(found: Measured) -> list[str]:
    """Answers to harmful prompts that are neither refusals nor answers."""
    known = found.cells[found.cells["degenerate"].notna()]
    counts = known[["off_topic", "degenerate"]].mul(known["n"], axis=0).sum().round()
    names = ["are off-topic or repeat the request", "are degenerate (loops, no usable text)"]
    parts = [f"{percent(many / known['n'].sum())} {name}"
             for name, many in zip(names, counts, strict=True) if many]  # fmt: skip
    if not parts:
        return []
    return [f"Of the answers to harmful prompts, {_list(parts)}; these do not count as unsafe."]


def _missing(found: Measured) -> list[str]:
    columns = ["failed", "not_applicable", "unscored"]
    counts = found.cells[columns].sum() + found.over_refusal[columns].sum()
    names = ["failed", "are not applicable", "could not be scored"]
    parts = [f"{int(many):,} {name}" for name, many in zip(names, counts, strict=True) if many]
    if not parts:
        return []
    return [f"Of the trials, {_list(parts)}; none of these is counted as safe."]
