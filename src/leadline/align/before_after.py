"""A model before and after training, asked the same: what did it cost, what did it bring?

Ordinary trials in one store under `out`, so what was asked once is not asked again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import engine, plan
from ..analysis.results import Results
from ..depth import curves
from ..progress import Listener
from ..study import Study

KS = (1, 2, 5, 10, 20, 40)


@dataclass(frozen=True)
class BeforeAfter:
    """`rows`: {measure, before, after}, each of the two {value, low, high, n} with a 95% interval;
    a rate, or for "prefill depth D50" a number of tokens (`censored` as in curves.D50)."""

    rows: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "settings": dict(self.settings)}


def before_after(
    before: str | Path,
    after: str | Path,
    out: Path,
    *,
    dataset: Any = "guild",
    judge: Any = None,
    limit: int | None = None,
    max_tokens: int = 256,
    ks: tuple[int, ...] = KS,
    sweep: str = "short",
    listener: Listener | None = None,
) -> BeforeAfter:
    """Ask both models the dataset plainly, after k forced tokens, and at many decoding settings;
    write `out`/before_after.json. Raises LeadlineError for bad input."""
    study = _study(before, after, dataset, judge, max_tokens, ks, sweep)
    results = engine.run(study, out, limit=limit, listener=listener)
    sides = {side: _side(results, side, ks, sweep) for side in ("before", "after")}
    names = list(dict.fromkeys([*sides["before"], *sides["after"]]))
    rows = tuple(
        {"measure": name, **{side: found.get(name) for side, found in sides.items()}}
        for name in names
    )
    settings = {
        "before": str(before),
        "after": str(after),
        "dataset": study.datasets[0].model_dump(),
        "judge": judge,
        "prefix lengths": list(ks),
        "decoding": sweep,
        "max_tokens": max_tokens,
        "level": 0.95,
    }
    made = BeforeAfter(rows, settings)
    (out / "before_after.json").write_text(
        json.dumps(made.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    return made


def check(dataset: Any, judge: Any, limit: int | None, max_tokens: int) -> str:
    """The dataset's name. Raises LeadlineError where `before_after` would, without any model."""
    study = _study("before", "after", dataset, judge, max_tokens, KS, "short")
    plan.load(study, limit)
    return study.datasets[0].name


def _study(
    before: str | Path,
    after: str | Path,
    dataset: Any,
    judge: Any,
    max_tokens: int,
    ks: tuple[int, ...],
    sweep: str,
) -> Study:
    return Study.model_validate(
        {
            "name": "before and after",
            "targets": [
                {"model": str(before), "name": "before"},
                {"model": str(after), "name": "after"},
            ],
            "datasets": [dataset],
            "attacks": ["direct", {"prefill": {"k": list(ks)}}, {"decoding": {"sweep": sweep}}],
            "judges": [] if judge is None else [judge],
            "sampling": {"max_tokens": max_tokens},
        }
    )


def _side(results: Results, model: str, ks: tuple[int, ...], sweep: str) -> dict[str, Any]:
    """By measure: {value, low, high, n}."""
    found: dict[str, Any] = {}
    cells = results.cells()
    for cell in cells[cells["model"] == model].to_dict("records"):
        name = "any decoding setting" if "decoding" in cell["attack"] else cell["attack"]
        found[f"ASR {name}"] = _rate(cell, "asr", "low", "high")
    doses = {0: "direct", **{k: f"prefill(k={k})" for k in ks}}
    broken, bases = curves.broken_by_dose(results, model, doses)
    found["prefill depth D50"] = curves.d50(broken, bases, unit="tokens").to_dict()
    harmless = results.over_refusal()
    for cell in harmless[harmless["model"] == model].to_dict("records"):
        found["over-refusal"] = _rate(cell, "rate", "low", "high")
        if not math.isnan(cell["utility"]):
            found["utility"] = _rate(cell, "utility", "utility_low", "utility_high")
    return found


def _rate(cell: Mapping[Any, Any], *names: str) -> dict[str, Any]:
    values = (cell[name] for name in names)
    value, low, high = (None if math.isnan(v) else float(v) for v in values)
    return {"value": value, "low": low, "high": high, "n": int(cell["n"])}
