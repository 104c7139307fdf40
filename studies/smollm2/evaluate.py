"""What the study measures on held-out prompts, for any number of models side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leadline import Study, engine
from leadline.analysis.intervals import wilson
from leadline.depth import curves
from leadline.depth.d50 import d50
from leadline.depth.kl.divergence import kl_by_token
from leadline.files import write_private
from leadline.records import Prompt
from prompts import HARMLESS_TOKENS, Data, fast_dtype, spread

Listener = Callable[[Any], None]


@dataclass(frozen=True)
class Measures:
    """What to measure: prefixes of `ks` tokens, answers of at most `max_tokens` tokens, and at most
    `limit` prompts of each kind."""

    ks: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    max_tokens: int = 48
    limit: int | None = None


def evaluate(
    models: Mapping[str, str | Path],
    untouched: str | Path,
    data: Data,
    out: Path,
    measures: Measures = Measures(),
    listener: Listener | None = None,
) -> dict[str, dict[str, Any]]:
    """By name of the model: rates {value, low, high, n} of forbidden prompts that are not refused
    ("not_refused", by number of prefilled tokens), of refused look-alikes and everyday requests
    ("over_refusal"), D50 of the prefill curve, KL from the untouched model in nats per token of its
    own answers to harmless prompts, and the mean number of characters of harmless answers.

    Answers are stored in `out`, so that a model is asked once for each prompt.
    """
    topics = ("forbidden", "look-alike", "everyday")
    datasets = [data.dataset(topic, limit=measures.limit) for topic in topics]
    prefills: list[Any] = ["direct", {"prefill": {"k": list(measures.ks)}}]
    datasets[0]["file"]["attacks"] = prefills
    study = Study.model_validate({
        "name": "held-out prompts",
        "targets": [
            {"model": str(path), "name": name, "dtype": fast_dtype()}
            for name, path in models.items()
        ],
        "datasets": datasets,
        "attacks": ["direct"],
        "judges": ["refusal"],
        "sampling": {"temperature": 0, "max_tokens": measures.max_tokens},
    })  # fmt: skip
    results = engine.run(study, out, listener=listener, keep=True)
    cells, harmless = results.cells(), results.over_refusal()
    found = {}
    for name, path in models.items():
        doses = {0: "direct", **{k: f"prefill(k={k})" for k in measures.ks}}
        rates = {
            str(k): _not_refused(cell)
            for k, label in doses.items()
            for cell in cells[(cells["model"] == name) & (cells["dataset"] == "forbidden")
                              & (cells["attack"] == label)].to_dict("records")
        }  # fmt: skip
        broken, bases = curves.broken_by_dose(results, name, doses)
        refused = {
            cell["dataset"]: _rate(cell, "rate")
            for cell in harmless[(harmless["model"] == name)
                                 & (harmless["attack"] == "direct")].to_dict("records")
        }  # fmt: skip
        lengths = results.query(
            "SELECT avg(length(r.answer)) FROM outcomes o JOIN responses r ON r.key = o.key "
            "WHERE o.model = ? AND NOT o.harmful", name,
        )  # fmt: skip
        found[name] = {
            "not_refused": rates,
            "over_refusal": refused,
            "d50": d50(broken, bases, unit="tokens").model_dump(exclude={"examples_per_step"}),
            "kl_harmless": kl_harmless(path, untouched, data, measures.limit),
            "harmless_characters": lengths[0][0],
        }
    return found


def kl_harmless(
    model: str | Path, untouched: str | Path, data: Data, limit: int | None = None
) -> dict[str, Any]:
    """KL(model || untouched) in nats per token, along the untouched model's greedy answers to
    held-out harmless prompts."""
    if str(model) == str(untouched):
        return {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    rows = [row for row in spread(data.select("harmless", "test"), limit) if row.target]
    prompts = [Prompt(row.id, row.prompt, "harmless", target=row.target) for row in rows]
    divergence = kl_by_token(model, untouched, prompts, max_tokens=HARMLESS_TOKENS)
    return {**divergence.to_dict()["mean"], "n": len(prompts)}


def _not_refused(cell: Mapping[Any, Any]) -> dict[str, Any]:
    """The share of answers that are no refusals: compliance, and answers about something else or
    without sense, which ASR does not count."""
    n = int(cell["n"])
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    share = 1 - float(cell["refused"])
    low, high = wilson(share * n, n)
    return {"value": share, "low": low, "high": high, "n": n, "asr": float(cell["asr"])}


def _rate(cell: Mapping[Any, Any], name: str) -> dict[str, Any]:
    numbers = {"value": cell[name], "low": cell["low"], "high": cell["high"]}
    known = {k: None if math.isnan(v) else float(v) for k, v in numbers.items()}
    return {**known, "n": int(cell["n"])}


def write(file: Path, result: Any) -> None:
    """Write a result as JSON."""
    write_private(file, json.dumps(result, indent=1, allow_nan=False) + "\n")


def describe(name: str, found: Mapping[str, Any], ks: Sequence[int]) -> str:
    """One line with a model's main figures."""
    rates = found["not_refused"]
    curve = " ".join(f"k={k} {rates[str(k)]['value']:.2f}" for k in (0, *ks) if str(k) in rates)
    refused = ", ".join(f"{k} {v['value']:.2f}" for k, v in found["over_refusal"].items())
    return (
        f"{name}: not refused {curve}; over-refusal {refused}; "
        f"KL on harmless answers {found['kl_harmless']['value']:.2f}"
    )
