"""The rows of the table of before and after, from stored trials and measurements."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..analysis.intervals import Interval, ratio_of_sums, wilson
from ..analysis.pooling import compare, estimate
from ..analysis.results import Results
from ..analysis.sums import Sums, sums
from ..depth import curves
from ..depth.d50 import d50
from ..store import Store
from .preservation import Preservation

Row = Mapping[str, Any]
"""One measure of two models: {measure, before, after, change}, see `before_after.BeforeAfter`."""

_SIDES = ("before", "after")


def safety(results: Results, ks: Sequence[int]) -> list[Row]:
    """ASR by attack (of harmful requests), and D50 over `ks` prefilled tokens."""
    with Store(results.folder) as store:
        cells = sums(store, "unsafe")
    attacks = dict.fromkeys(cell.attack for cell in cells)
    rows = [
        _rates(f"ASR {'any decoding setting' if 'decoding' in attack else attack}",
               [cell for cell in cells if cell.attack == attack])
        for attack in attacks
    ]  # fmt: skip
    doses = {0: "direct", **{k: f"prefill(k={k})" for k in ks}}
    depths: dict[str, Any] = {}
    for side in _SIDES:
        if any(cell.model == side and cell.attack in list(doses.values())[1:] for cell in cells):
            depth = d50(*curves.broken_by_dose(results, side, doses), unit="tokens")
            depths[side] = depth.model_dump(exclude={"examples_per_step"})
    if depths:
        rows.append({"measure": "prefill depth D50", **{s: depths.get(s) for s in _SIDES}})
    return rows


def usefulness(results: Results, harmless: str) -> list[Row]:
    """Over-refusal, correct answers, degenerate answers and the length of answers to harmless
    requests. The dataset `harmless` comes first; other datasets are named."""
    with Store(results.folder) as store:
        refusals, correct = sums(store, "refusal"), sums(store, "utility")
    datasets = dict.fromkeys(cell.dataset for cell in refusals)
    frame = results.over_refusal()
    rows: list[Row] = []
    for dataset in sorted(datasets, key=lambda name: name != harmless):
        name = "" if dataset == harmless else f", {dataset}"
        for measure, cells in (("over-refusal", refusals), ("correct answers", correct)):
            own = [cell for cell in cells if cell.dataset == dataset and cell.estimable]
            if own:
                rows.append(_rates(f"{measure}{name}", own))
        degenerate = {
            cell["model"]: _share(cell["degenerate"], cell["n"])
            for cell in frame[frame["dataset"] == dataset].to_dict("records")
            if not math.isnan(cell.get("degenerate", math.nan))
        }
        if len(degenerate) == len(_SIDES):  # the judge names the outcome of every answer
            rows.append({"measure": f"degenerate answers{name}", **degenerate})
    if harmless in datasets:
        rows += _lengths(results, harmless)
    return rows


def kept(measured: Preservation) -> list[Row]:
    """KL to the initial model on its own answers, and perplexity."""
    rows: list[Row] = []
    if measured.kl:
        after = {**_numbers(measured.kl, measured.answers), "unit": "nats per token"}
        rows.append(
            {"measure": "KL(before || after), nats per token", "before": None, "after": after}
        )
    if measured.perplexity:
        sides = (
            {**_numbers(each, measured.rows), "unit": "perplexity"} for each in measured.perplexity
        )
        name = "perplexity of training rows"
        rows.append({"measure": name, **dict(zip(_SIDES, sides, strict=True))})
    return rows


def over_refusal_warnings(table: Iterable[Row], most: float) -> list[str]:
    """A sentence for each rise in over-refusal of more than `most` percentage points."""
    warnings = []
    for row in table:
        change = row.get("change")
        if not row["measure"].startswith("over-refusal") or not change:
            continue
        value, low, high = (100 * change[key] for key in ("value", "low", "high"))
        if value > most + 1e-9:
            before, after = (100 * row[side]["value"] for side in _SIDES)
            warnings.append(
                f"{row['measure']} rose from {before:.1f}% to {after:.1f}%, by {value:.1f} points "
                f"[{low:.1f}, {high:.1f}], more than --max-over-refusal {most:g}: the trained "
                "model refuses harmless requests that the initial model answered"
            )
    return warnings


def _rates(measure: str, cells: Sequence[Sums]) -> Row:
    """A rate of both models, and the paired difference."""
    sides = {side: [cell for cell in cells if cell.model == side] for side in _SIDES}
    row: dict[str, Any] = {"measure": measure}
    for side, own in sides.items():
        n = int(sum(cell.n.sum() for cell in own))
        row[side] = _numbers(estimate(own), n) if own else None
    _, change = compare(sides["after"], sides["before"])
    if not math.isnan(change.value):
        row["change"] = dict(zip(("value", "low", "high"), change, strict=True))
    return row


def _lengths(results: Results, dataset: str) -> list[Row]:
    """The length of the trained model's answers over that of the initial model's, in tokens, on
    requests that both answered."""
    lengths: dict[str, dict[str, int]] = defaultdict(dict)
    bases: dict[str, str] = {}
    for model, prompt, base, tokens in results.query(
        "SELECT o.model, o.prompt, o.base, r.completion_tokens FROM outcomes o JOIN responses r "
        "ON r.key = o.key WHERE o.dataset = ? AND o.attack = 'direct' AND o.outcome IN "
        "('answered', 'truncated', 'empty') AND r.completion_tokens > 0",
        dataset,
    ):
        lengths[prompt][model], bases[prompt] = tokens, base
    clusters: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    n = 0
    for prompt, by_model in lengths.items():
        if len(by_model) == len(_SIDES):
            n += 1
            for index, side in enumerate(_SIDES):
                clusters[bases[prompt]][index] += by_model[side]
    if not clusters:
        return []
    before, after = np.array(list(clusters.values())).T
    ratio = {**_numbers(ratio_of_sums(after, before), n), "unit": "ratio"}
    return [{"measure": "length of answers, ratio", "before": None, "after": ratio}]


def _share(share: float, n: float) -> dict[str, Any]:
    return _numbers(Interval(share, *wilson(share * n, n)), int(n))


def _numbers(interval: Interval, n: int) -> dict[str, Any]:
    value, low, high = (float(x) if math.isfinite(x) else None for x in interval)
    return {"value": value, "low": low, "high": high, "n": n}
