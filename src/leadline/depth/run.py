"""All depth measures of several models, side by side, in one report.

    report = leadline.measure_depth(["organism:aligned", "organism:deep"], base="organism:base")
    report.findings, report.d50["organism:aligned"]["prefill"], report.html

Measures that need only prompts and sampling settings run as ordinary trials, stored in
`out/trials`; results computed from weights are stored in `out/parts`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EACCES
from pathlib import Path
from typing import Any

from ..files import private_folder, write_private
from ..models.checkpoint import Checkpoint
from ..progress import Listener
from ..records import LeadlineError
from ..registry import MeasurePlugin, get, plugins, unknown
from ..report.depth.findings import findings
from ..report.depth.page import write_depth_report
from ..version import __version__
from .budgets import BUDGETS
from .session import Session, tokenizer_of


@dataclass(frozen=True)
class DepthReport:
    """The result of `measure_depth`: `data` is the content of the file `json`, `html` the page."""

    data: Mapping[str, Any]
    json: Path
    html: Path

    @property
    def findings(self) -> list[str]:
        """The results in sentences."""
        return list(self.data["findings"])

    @property
    def caution(self) -> str:
        """What the judge's verdicts do not say ("": they are about content)."""
        return str(self.data["settings"].get("caution", ""))

    @property
    def d50(self) -> dict[str, dict[str, Any]]:
        """D50 by model and measure, with the fields of `report.depth.schema.D50`."""
        return dict(self.data["d50"])

    def to_dict(self) -> dict[str, Any]:
        """A copy of `data`."""
        return dict(self.data)


def measure_depth(
    models: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    *,
    dataset: str | Mapping[str, Any] = "guild",
    judge: str | Mapping[str, Any] | None = None,
    out: str | Path = "leadline-depth",
    budget: str = "standard",
    measures: str | Sequence[str] | None = None,
    listener: Listener | None = None,
) -> DepthReport:
    """Measure how deep the safety of each model is; write depth.json and depth.html to `out`.

    Models are folders (PEFT adapters too), hub ids or "organism:aligned". `base` is the model
    before alignment, with the same vocabulary: the measures `kl` and `refusal_prefix` need it.
    `dataset` and `judge` are written as in a study file (default judge: the dataset's own); some
    measures need prompts with target answers. `budget` is "quick", "standard" or "full" (see
    `leadline.depth.budgets`). `measures` are names from `leadline list measures` (None: all). A
    call with the same arguments resumes one that was stopped.

    Raises LeadlineError for invalid arguments, before anything is measured. A measure that fails
    for a model is skipped, with the reason in the report.
    """
    names = [str(m) for m in ([models] if isinstance(models, str | Path) else models)]
    if not names:
        raise LeadlineError("depth: no model: name at least one folder, hub id or organism")
    chosen = _measures(measures)
    if budget not in BUDGETS:
        raise LeadlineError(unknown("budget", budget, BUDGETS))
    names = list(dict.fromkeys(names))
    for name in [*names, *([] if base is None else [str(base)])]:
        Checkpoint.find(name)  # raises for an invalid model, before anything is measured
    for name in names:
        if not tokenizer_of(name).chat_template:
            raise LeadlineError(
                f"model {name}: its tokenizer has no chat template, which requests need: save one "
                "as chat_template.jinja in its folder, or give this model as the base"
            )
    base = None if base is None else str(base)
    session = Session(names, base, dataset, judge, Path(out), BUDGETS[budget], listener)
    _check_writable(Path(out))
    for plugin in plugins("measure"):
        if plugin not in chosen:
            session.skipped[plugin.name] = "not requested"
        elif missing := _missing(session, plugin):
            session.skipped[plugin.name] = missing
        else:
            plugin.function(session)
    return _report(session, budget)


def _measures(names: str | Sequence[str] | None) -> list[MeasurePlugin]:
    """The measures with these names. Raises LeadlineError for an unknown name or an empty list."""
    every = plugins("measure")
    if names is None:
        return every
    if not (names := [names] if isinstance(names, str) else names):
        valid = ", ".join(plugin.name for plugin in every)
        raise LeadlineError(f"depth: no measure: name at least one of {valid}")
    return [get("measure", name) for name in names]


def _missing(session: Session, plugin: MeasurePlugin) -> str:
    """Why a measure cannot run in this session; "" if it can."""
    if "base" in plugin.needs and session.base is None:
        return "it compares with a base model: give one as --base"
    if "targets" in plugin.needs and not session.targeted:
        return (
            f"it needs target answers, and the prompts of {session.dataset_name} have none: give "
            "the dataset a target column"
        )
    return ""


def _report(session: Session, budget: str) -> DepthReport:
    lists = [name for p in plugins("measure") for s in p.sections for name in s.points]
    data: dict[str, Any] = {
        "leadline": __version__,
        "models": session.models,
        "base": session.base,
        "dataset": session.dataset_name,
        "budget": budget,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "findings": [],
        **{name: session.points.get(name, []) for name in lists},
        "d50": session.d50,
        "settings": {
            "judge": session.judge.label,
            "caution": session.judge.caution,
            **session.settings,
        },
        "skipped": session.skipped,
    }
    data = json.loads(json.dumps(data, allow_nan=False))  # the same types as in the file
    data["findings"] = findings(data)
    file = session.out / "depth.json"
    write_private(file, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return DepthReport(data, file, write_depth_report(session.out).html)


def _check_writable(out: Path) -> None:
    try:
        private_folder(out)
        if not os.access(out, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES))
    except OSError as error:
        raise LeadlineError(
            f"cannot write to {out} ({error.strerror}): give another folder as --out"
        ) from None
