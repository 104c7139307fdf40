"""`leadline.depth`: every measure of depth, for several models side by side, in one report.

    report = leadline.depth(["organism:aligned", "organism:deep"], base="organism:base")
    report.findings, report.d50["organism:aligned"]["prefill"], report.html

What any interface can do (response prefixes, decoding settings) is asked as ordinary trials, kept
in `out/trials`; what is computed from weights is kept in `out/parts`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EACCES
from functools import partial
from pathlib import Path
from typing import Any

from ..version import __version__
from ..progress import Listener
from ..records import LeadlineError
from ..registry import unknown
from ..report.depth.findings import findings
from ..report.depth.page import write_depth_report
from . import _measures
from ..models.checkpoint import Checkpoint
from .session import Sounding, tokenizer_of
from .budgets import BUDGETS

MEASURES = ("kl", "refusal_prefix", "prefill", "decoding", "gcg", "finetuning")
_PROFILES = ("token_loss", "gradient_norm")


@dataclass(frozen=True)
class DepthReport:
    """What was measured: `data` is what stands in `json`, and `html` shows it."""

    data: Mapping[str, Any]
    json: Path
    html: Path

    @property
    def findings(self) -> list[str]:
        """The reading in plain words."""
        return list(self.data["findings"])

    @property
    def d50(self) -> dict[str, dict[str, Any]]:
        """The headline numbers, by model and measure."""
        return dict(self.data["d50"])

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)


def depth(
    models: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    *,
    dataset: str | Mapping[str, Any] = "guild",
    judge: str | Mapping[str, Any] | None = None,
    out: str | Path = "leadline-depth",
    budget: str = "standard",
    measures: str | Sequence[str] = MEASURES,
    listener: Listener | None = None,
) -> DepthReport:
    """Measure how deep the safety of each model goes; write `out`/depth.json and depth.html.

    Models are folders (PEFT adapters too), hub ids or "organism:aligned". Against `base`, a model
    of the same vocabulary, KL by token is measured, and on it the effect of a refusal's start.
    `dataset` and `judge` are written as in a study file; what goes along a harmful answer needs
    prompts with targets. `budget` is quick, standard or full (see `budgets`). Called again with
    the same `out`, it goes on where it was stopped.

    Raises LeadlineError for what the user can mend before anything is measured. A measure that
    cannot be taken of a model is skipped, and the report says why.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in models: before torch is there
    names = [str(m) for m in ([models] if isinstance(models, str | Path) else models)]
    if not names:
        raise LeadlineError("depth: no model: name at least one folder, hub id or organism")
    measures = [measures] if isinstance(measures, str) else measures
    for measure in measures:
        if measure not in MEASURES:
            raise LeadlineError(unknown("measure of depth", measure, MEASURES))
    if not measures:
        raise LeadlineError(f"depth: no measure: name at least one of {', '.join(MEASURES)}")
    if budget not in BUDGETS:
        raise LeadlineError(unknown("budget", budget, BUDGETS))
    named = list(dict.fromkeys(names))
    for name in [*named, *([] if base is None else [str(base)])]:
        Checkpoint.find(name)  # what is no model is named before anything is measured
    for name in named:
        if not tokenizer_of(name).chat_template:
            raise LeadlineError(
                f"model {name}: its tokenizer has no chat template, so it cannot be asked: save "
                "one as chat_template.jinja in its folder, or give it as the base"
            )
    compared = None if base is None else str(base)
    sounding = Sounding(named, compared, dataset, judge, Path(out), BUDGETS[budget], listener)
    _writable(Path(out))
    for measure in MEASURES:
        if measure in measures:
            _take(sounding, measure)
        else:
            sounding.skipped[measure] = "not asked for"
    return _report(sounding, budget)


def _take(s: Sounding, measure: str) -> None:
    """One measure of all models. What one model cannot bear ends that measure of it only."""
    if measure in ("kl", "refusal_prefix") and s.base is None:
        s.skipped[measure] = "it compares with a base model: give one as --base"
    elif measure not in ("decoding", "refusal_prefix") and not s.targeted:
        s.skipped[measure] = (
            f"it goes along harmful answers, and the prompts of {s.name} have none: give "
            "the dataset a target column"
        )
    elif measure in _measures.OF_ALL:
        _measures.OF_ALL[measure](s)
    else:
        for model in [str(s.base)] if measure == "refusal_prefix" else s.models:
            s.attempt(measure, model, partial(_measures.OF_ONE[measure], s, model))


def _report(s: Sounding, budget: str) -> DepthReport:
    data: dict[str, Any] = {
        "leadline": __version__,
        "models": s.models,
        "base": s.base,
        "dataset": s.name,
        "budget": budget,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "findings": [],
        **{name: s.points.get(name, []) for name in (*MEASURES, *_PROFILES)},
        "training": [point for model in s.models for point in _training(model)],
        "d50": s.d50,
        "settings": {"judge": s.judge.label, **s.settings},
        "skipped": s.skipped,
    }
    data = json.loads(json.dumps(data, allow_nan=False))  # as a reader of the file has it
    data["findings"] = findings(data)
    s.out.mkdir(parents=True, exist_ok=True)
    file = s.out / "depth.json"
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return DepthReport(data, file, write_depth_report(s.out).html)


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES))
    except OSError as error:
        raise LeadlineError(
            f"cannot write to {out} ({error.strerror}): give another folder as --out"
        ) from None


def _training(model: str) -> list[dict[str, Any]]:
    """The curves that a safety callback left beside a model's weights."""
    file = Path(model) / "safety" / "training.json"
    if not file.is_file():
        return []
    try:
        return [{**point, "model": model} for point in json.loads(file.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        raise LeadlineError(f"{file}: not the curves of a safety callback: remove it") from error
