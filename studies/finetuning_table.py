"""From finished cells to the table: means with intervals, as JSON, Markdown and on the screen.

An interval is the 95% percentile interval of a bootstrap that draws both seeds and base prompts
with replacement (Owen 2007, The pigeonhole bootstrap), 2,000 times; where all answers agree,
Wilson's for the number of base prompts. Plain and constrained runs share their seeds, prompts and
draws, so their difference is a paired one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leadline.analysis.clusters import wilson

DRAWS = 2000
Values = Mapping[str, Sequence[float]]  # by base prompt
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


def estimate(runs: Sequence[Values], less: Sequence[Values] = ()) -> dict[str, Any]:
    """The mean over all answers of all seeds, or how much greater it is than that of `less`: then
    without an interval where nothing differs between draws."""
    rates = _rates(runs)
    if less:
        rates = rates - _rates(less)
    value, drawn = float(rates[0]), np.sort(rates[1:])
    tail = int(0.025 * len(drawn))
    low, high = float(drawn[tail]), float(drawn[-1 - tail])
    if less:
        moved = low < high
        return {"value": value, "low": low if moved else None, "high": high if moved else None}
    if low == high:
        low, high = wilson(value * len(runs[0]), len(runs[0]))
    by_seed = [float(np.mean([x for xs in run.values() for x in xs])) for run in runs]
    return {"value": value, "low": min(low, value), "high": max(high, value), "by_seed": by_seed}


def _rates(runs: Sequence[Values]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[1 + DRAWS]: as measured, then by draw. The draws depend on the numbers of seeds and bases
    alone, so that those of two methods go together."""
    bases = sorted({base for run in runs for base in run})
    n = np.array([[len(run.get(base, ())) for base in bases] for run in runs], float)
    total = np.array([[sum(run.get(base, ())) for base in bases] for run in runs], float)
    rng = np.random.default_rng([len(runs), len(bases)])

    def weights(many: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        drawn = rng.integers(many, size=(DRAWS, many))
        counts = np.stack([np.bincount(row, minlength=many) for row in drawn])
        return np.vstack([np.ones(many), counts])

    seeds, prompts = weights(len(runs)), weights(len(bases))
    of = "ds,db,sb->d"
    rates: np.ndarray[Any, np.dtype[np.float64]] = np.einsum(of, seeds, prompts, total) / np.einsum(
        of, seeds, prompts, n
    )
    return rates


def rows(found: Mapping[tuple[str, str, str], Sequence[Mapping[str, Values]]]) -> list[Any]:
    """A row per model, data, method and measure, from the values of the seeds of each cell."""
    made = []
    for (model, data, method), runs in found.items():
        for measure in NAMES:
            if all(measure in run for run in runs):
                of = {"model": model, "data": data, "method": method, "measure": measure}
                own = [run[measure] for run in runs]
                row = {**of, "seeds": len(runs), **estimate(own)}
                plain = found.get((model, data, PLAIN), ())
                if method not in (INITIAL, PLAIN) and len(plain) == len(runs):
                    row["from_SFT"] = estimate(own, [run[measure] for run in plain])
                made.append(row)
    return made


def write(out: Path, made: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Grid]:
    """table.json and table.md, whole or not at all; returned is what the latter shows."""
    grids = _grids(made)
    text = "\n\n".join([_HEAD, *(_markdown(*grid) for grid in grids), _foot(settings)]) + "\n"
    whole = json.dumps({"rows": made, **settings}, indent=1) + "\n"
    for name, content in (("table.json", whole), ("table.md", text)):
        part = out / f"{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(out / name)
    return grids


Grid = tuple[str, list[str], list[list[str]]]


def _grids(made: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Per model a table of all data, then one of the ablation: title, heads, lines."""
    grids = []
    for model in dict.fromkeys(row["model"] for row in made):
        mine = [row for row in made if row["model"] == model]
        main = [INITIAL, PLAIN, PAPER]
        lines = _lines([r for r in mine if r["method"] in main], main, difference=True)
        heads = ["data", "measure", *main, "difference"]
        grids.append((f"organism:{model}", heads, lines))
        methods = list(dict.fromkeys(row["method"] for row in mine))
        ablated = {row["data"] for row in mine if row["method"] not in main}
        if ablated:
            kept = [r for r in mine if r["data"] in ablated]
            every = [m for m in methods if m != INITIAL]
            title = f"organism:{model}, other schedules"
            grids.append((title, ["data", "measure", *every], _lines(kept, every)))
    return grids


def _lines(
    made: Sequence[Mapping[str, Any]], methods: Sequence[str], difference: bool = False
) -> list[list[str]]:
    lines = []
    initial = {r["measure"]: r for r in made if r["method"] == INITIAL}
    for data in dict.fromkeys(row["data"] for row in made if row["method"] != INITIAL):
        here = [row for row in made if row["data"] == data]
        for measure in NAMES:
            by = {row["method"]: row for row in here if row["measure"] == measure}
            if not by:
                continue
            by |= {INITIAL: initial[measure]} if measure in initial else {}
            line = [data, NAMES[measure], *(_shown(by.get(method)) for method in methods)]
            more = by.get(PAPER, {}).get("from_SFT")
            lines.append([*line, _shown(more, "+.2f")] if difference else line)
    return lines


def _shown(row: Mapping[str, Any] | None, form: str = ".2f") -> str:
    if row is None or math.isnan(row["value"]):
        return ""
    if row["low"] is None:
        return f"{row['value']:{form}}"
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _markdown(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [heads, ["---"] * len(heads), *lines]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(row) + " |" for row in ruled)])


_HEAD = """\
# Plain and constrained fine-tuning

Means over seeds and prompts with 95% intervals: a bootstrap over both seeds and base prompts
(pigeonhole; Wilson's where all answers agree). `difference` is constrained less SFT, paired by
seed and prompt, without an interval where no answers differ. With so few seeds the intervals are
rough: table.json has every seed's mean. `harmful-fast` is harmful data at three times the learning
rate. Of the ordinary harmless prompts, none whose base was learned from is counted."""


def _foot(settings: Mapping[str, Any]) -> str:
    trainings = [
        f"- {name}: {how['optim']}, learning rate {how['lr']:g}, {how['steps']} steps of "
        f"{how['batch']}, warmup {how['warmup']}, then linear to 0"
        for name, how in settings["trainings"].items()
    ]
    done, cells = settings["done"], settings["cells"]
    what = f"{done} of {cells} cells are done." if done < cells else f"All {cells} cells are done."
    return "\n".join(["## Settings", "", what, "", *trainings])
