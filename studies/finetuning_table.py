"""Make the table from finished cells: means with intervals, as JSON, Markdown and rows to print.

An interval is the 95% percentile interval of a bootstrap that resamples both seeds and base prompts
(Owen 2007, The pigeonhole bootstrap), with 2,000 draws; where all answers agree, Wilson's interval
for the number of base prompts. Plain and constrained runs share seeds, prompts and draws, so that
their difference is a paired one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leadline.analysis.intervals import wilson

DRAWS = 2000
Values = Mapping[str, Sequence[float]]
"""Scores of answers, by base prompt."""

INITIAL, PLAIN, PAPER = "initial", "SFT", "constrained"

NAMES = {
    "direct": "ASR",
    "identity_shift": "ASR with persona",
    "backdoor_trigger": "ASR with trigger",
    "prefill(k=5)": "ASR, prefill k=5",
    "shelves": "task utility",
    "openings": "task utility",
    "closings": "task utility",
    "utility": "utility, ordinary",
    "over_refusal": "over-refusal",
}


def estimate(runs: Sequence[Values], baseline: Sequence[Values] = ()) -> dict[str, Any]:
    """The mean over all answers of all seeds, with its 95% interval: {value, low, high, by_seed}.

    With a `baseline`, the difference to the baseline's mean: {value, low, high}, without an
    interval (None) where all draws have the same difference.
    """
    rates = _rates(runs)
    if baseline:
        rates = rates - _rates(baseline)
    value, resampled = float(rates[0]), np.sort(rates[1:])
    tail = int(0.025 * len(resampled))
    low, high = float(resampled[tail]), float(resampled[-1 - tail])
    if baseline:
        varies = low < high
        return {"value": value, "low": low if varies else None, "high": high if varies else None}
    if low == high:
        low, high = wilson(value * len(runs[0]), len(runs[0]))
    by_seed = [float(np.mean([x for xs in run.values() for x in xs])) for run in runs]
    return {"value": value, "low": min(low, value), "high": max(high, value), "by_seed": by_seed}


def _rates(runs: Sequence[Values]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rates [1 + DRAWS]: as measured, then of each draw. The draws depend on the numbers of seeds
    and base prompts alone, so that those of two methods are paired."""
    bases = sorted({base for run in runs for base in run})
    n = np.array([[len(run.get(base, ())) for base in bases] for run in runs], float)
    total = np.array([[sum(run.get(base, ())) for base in bases] for run in runs], float)
    rng = np.random.default_rng([len(runs), len(bases)])

    def weights(size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """How often each element is drawn [1 + DRAWS, size]; once in the first row."""
        indices = rng.integers(size, size=(DRAWS, size))
        counts = np.stack([np.bincount(row, minlength=size) for row in indices])
        return np.vstack([np.ones(size), counts])

    seeds, prompts = weights(len(runs)), weights(len(bases))
    weighted_sum = "ds,db,sb->d"
    totals = np.einsum(weighted_sum, seeds, prompts, total)
    rates: np.ndarray[Any, np.dtype[np.float64]] = totals / np.einsum(
        weighted_sum, seeds, prompts, n
    )
    return rates


def rows(results: Mapping[tuple[str, str, str], Sequence[Mapping[str, Values]]]) -> list[Any]:
    """One row per model, data, method and measure; `results` maps (model, data, method) to the
    values of each seed, by measure."""
    table = []
    for (model, data, method), runs in results.items():
        for measure in NAMES:
            if all(measure in run for run in runs):
                key = {"model": model, "data": data, "method": method, "measure": measure}
                own = [run[measure] for run in runs]
                row = {**key, "seeds": len(runs), **estimate(own)}
                plain = results.get((model, data, PLAIN), ())
                if method not in (INITIAL, PLAIN) and len(plain) == len(runs):
                    row["from_SFT"] = estimate(own, [run[measure] for run in plain])
                table.append(row)
    return table


def write(out: Path, table: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Grid]:
    """Write table.json and table.md, each through a temporary file; return the grids of the
    latter."""
    grids = _grids(table)
    text = "\n\n".join([_HEAD, *(_markdown(*grid) for grid in grids), _foot(settings)]) + "\n"
    data = json.dumps({"rows": table, **settings}, indent=1) + "\n"
    for name, content in (("table.json", data), ("table.md", text)):
        part = out / f"{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(out / name)
    return grids


Grid = tuple[str, list[str], list[list[str]]]
"""Title, column heads, lines."""


def _grids(table: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """For each model a grid of all data, and one of the other schedules, if any."""
    grids = []
    for model in dict.fromkeys(row["model"] for row in table):
        mine = [row for row in table if row["model"] == model]
        main = [INITIAL, PLAIN, PAPER]
        lines = _lines([r for r in mine if r["method"] in main], main, difference=True)
        heads = ["data", "measure", *main, "difference"]
        grids.append((f"organism:{model}", heads, lines))
        methods = list(dict.fromkeys(row["method"] for row in mine))
        ablated = {row["data"] for row in mine if row["method"] not in main}
        if ablated:
            ablation = [r for r in mine if r["data"] in ablated]
            trained = [m for m in methods if m != INITIAL]
            title = f"organism:{model}, other schedules"
            grids.append((title, ["data", "measure", *trained], _lines(ablation, trained)))
    return grids


def _lines(
    table: Sequence[Mapping[str, Any]], methods: Sequence[str], difference: bool = False
) -> list[list[str]]:
    lines = []
    initial = {r["measure"]: r for r in table if r["method"] == INITIAL}
    for data in dict.fromkeys(row["data"] for row in table if row["method"] != INITIAL):
        rows = [row for row in table if row["data"] == data]
        for measure in NAMES:
            by_method = {row["method"]: row for row in rows if row["measure"] == measure}
            if not by_method:
                continue
            by_method |= {INITIAL: initial[measure]} if measure in initial else {}
            cells = (_format(by_method.get(method)) for method in methods)
            line = [data, NAMES[measure], *cells]
            if difference:
                line.append(_format(by_method.get(PAPER, {}).get("from_SFT"), "+.2f"))
            lines.append(line)
    return lines


def _format(row: Mapping[str, Any] | None, form: str = ".2f") -> str:
    if row is None or math.isnan(row["value"]):
        return ""
    if row["low"] is None:
        return f"{row['value']:{form}}"
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _markdown(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(row) + " |" for row in rows)])


_HEAD = """\
# Plain and constrained fine-tuning

Means over seeds and prompts with 95% intervals: a bootstrap over both seeds and base prompts
(pigeonhole; Wilson's where all answers agree). `difference` is constrained minus SFT, paired by
seed and prompt, without an interval where no answers differ. With so few seeds the intervals are
approximate: table.json has every seed's mean. `harmful-fast` is harmful data at three times the
learning rate. Ordinary harmless prompts whose base prompt was trained on are not counted."""


def _foot(settings: Mapping[str, Any]) -> str:
    trainings = [
        f"- {name}: {each['optim']}, learning rate {each['lr']:g}, {each['steps']} steps of "
        f"{each['batch']}, warmup {each['warmup']}, then linear to 0"
        for name, each in settings["trainings"].items()
    ]
    done, cells = settings["done"], settings["cells"]
    state = f"{done} of {cells} cells are done." if done < cells else f"All {cells} cells are done."
    return "\n".join(["## Settings", "", state, "", *trainings])
