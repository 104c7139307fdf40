"""Compare a model before and after training: one evaluation of both, in one table.

The trials are those of an ordinary study in a store under `out`, so that a repeated evaluation
sends only requests that are not in the store yet.
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
from ..depth.d50 import d50
from ..files import write_private
from ..progress import Listener
from ..secret import without_secrets
from ..study import Study

KS = (1, 2, 5, 10, 20, 40)
"""Numbers of prefilled tokens."""


@dataclass(frozen=True)
class BeforeAfter:
    """The table, and the settings it was measured with.

    `rows` are {measure, before, after}. `before` and `after` are {value, low, high, n} with a 95%
    interval, or None where the model was not measured. Values are rates, except for "prefill depth
    D50": a number of tokens, with the fields of `leadline.depth.d50.D50`.
    """

    rows: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of before_after.json."""
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
    """Evaluate two models on the dataset: with direct requests, with k prefilled tokens, and with
    many decoding settings. Writes `out`/before_after.json. Raises LeadlineError for invalid input.
    """
    study = _build_study(before, after, dataset, judge, max_tokens, ks, sweep)
    results = engine.run(study, out, limit=limit, listener=listener, keep=True)
    sides = {side: _measures(results, side, ks, sweep) for side in ("before", "after")}
    names = list(dict.fromkeys([*sides["before"], *sides["after"]]))
    rows = tuple(
        {"measure": name, **{side: measures.get(name) for side, measures in sides.items()}}
        for name in names
    )
    settings = {
        "before": str(before),
        "after": str(after),
        "dataset": study.datasets[0].model_dump(),
        "judge": without_secrets(judge),
        "prefix lengths": list(ks),
        "decoding": sweep,
        "max_tokens": max_tokens,
        "level": 0.95,
    }
    table = BeforeAfter(rows, settings)
    text = json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n"
    write_private(out / "before_after.json", text)
    return table


def check_evaluation(dataset: Any, judge: Any, limit: int | None, max_tokens: int) -> str:
    """Validate the arguments of `before_after` without loading a model, and return the dataset's
    name. Raises LeadlineError where `before_after` would."""
    study = _build_study("before", "after", dataset, judge, max_tokens, KS, "short")
    plan.load(study, limit)
    return study.datasets[0].name


def _build_study(
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


def _measures(results: Results, model: str, ks: tuple[int, ...], sweep: str) -> dict[str, Any]:
    """{value, low, high, n} of one model, by measure."""
    measures: dict[str, Any] = {}
    cells = results.cells()
    for cell in cells[cells["model"] == model].to_dict("records"):
        name = "any decoding setting" if "decoding" in cell["attack"] else cell["attack"]
        measures[f"ASR {name}"] = _rate(cell, "asr", "low", "high")
    doses = {0: "direct", **{k: f"prefill(k={k})" for k in ks}}
    broken, bases = curves.broken_by_dose(results, model, doses)
    depth = d50(broken, bases, unit="tokens")
    measures["prefill depth D50"] = depth.model_dump(exclude={"examples_per_step"})
    harmless = results.over_refusal()
    for cell in harmless[harmless["model"] == model].to_dict("records"):
        measures["over-refusal"] = _rate(cell, "rate", "low", "high")
        if not math.isnan(cell["utility"]):
            measures["utility"] = _rate(cell, "utility", "utility_low", "utility_high")
    return measures


def _rate(cell: Mapping[Any, Any], *columns: str) -> dict[str, Any]:
    numbers = (cell[column] for column in columns)
    value, low, high = (None if math.isnan(v) else float(v) for v in numbers)
    return {"value": value, "low": low, "high": high, "n": int(cell["n"])}
