"""All depth measures of several models, side by side, in one report.

    report = leadline.measure_depth(["organism:aligned", "organism:deep"], base="organism:base")
    report.findings, report.d50["organism:aligned"]["prefill"], report.html

Measures that need only prompts and sampling settings run as ordinary trials, stored in
`out/trials`; results computed from weights are stored in `out/parts`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from errno import EACCES
from pathlib import Path
from typing import Any

from ..files import private_folder, write_private
from ..models.checkpoint import Checkpoint
from ..progress import Listener
from ..records import LeadlineError
from ..registry import MeasurePlugin, get, is_own, plugins, unknown
from ..report.depth.findings import findings
from ..report.depth.page import write_depth_report
from ..secret import hide, trace
from ..text import one_line
from ..version import __version__
from .budgets import BUDGETS, Budget, duration, parse_time
from .earlier import NOT_REQUESTED, with_earlier
from .estimate import Share, Speed, fit, measure_speed
from .session import Session, tokenizer_of

log = logging.getLogger("leadline")


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
    budget: str | Budget = "standard",
    measures: str | Sequence[str] | None = None,
    listener: Listener | None = None,
) -> DepthReport:
    """Measure how deep the safety of each model is; write depth.json and depth.html to `out`.

    Models are folders (PEFT adapters too), hub ids or "organism:aligned". `base` is the model
    before alignment, with the same vocabulary: the measures `kl` and `refusal_prefix` need it.
    `dataset` and `judge` are written as in a study file (default judge: the dataset's own); some
    measures need prompts with target answers. `budget` is "quick", "standard", "full" (see
    `leadline.depth.budgets`), limits of your own (a `Budget`), or a time such as "20min". A time is
    divided over the measures: the limits of "standard" are reduced until the estimated time of each
    fits its share. A measure that cannot fit is skipped, with the reason. `measures` are names from
    `leadline list measures` (None: all). A call with the same arguments resumes one that was
    stopped; one with other models, measures or another budget adds its results to the report in
    `out`.

    Raises LeadlineError for invalid arguments, before anything is measured. A measure that fails
    for a model is skipped, with the reason in the report.
    """
    session, chosen, seconds = _prepare(
        models, base, dataset, judge, Path(out), budget, measures, listener
    )
    _check_writable(Path(out))
    shares = _shares(session, chosen, seconds) if seconds else {}
    for plugin in plugins("measure"):
        share = shares.get(plugin.name)
        if plugin.name in session.skipped:
            continue
        if share and share.left_out:
            session.skipped[plugin.name] = share.left_out
            log.warning("%s is %s", plugin.name, share.left_out)
            continue
        if share:
            session.use(share.budget)
            reduced = f" ({share.reduced})" if share.reduced else ""
            time = f"about {duration(share.seconds)}" if share.seconds else "no time to speak of"
            log.warning("%s: %s, %s%s", plugin.name, time, share.work.text, reduced)
        _measure(session, plugin)
        settings = session.settings.get(plugin.name)
        if share and share.reduced and isinstance(settings, dict):
            settings["reduced to fit the time"] = share.reduced
    return _report(session, budget if isinstance(budget, str) else "custom")


@dataclass(frozen=True)
class Estimate:
    """What a measure would do: its work in words, the estimated seconds, what a budget by time
    reduced, and the reason where it would be skipped ("" for none)."""

    measure: str
    work: str = ""
    seconds: float = 0.0
    reduced: str = ""
    skipped: str = ""


def estimate_depth(
    models: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    *,
    dataset: str | Mapping[str, Any] = "guild",
    judge: str | Mapping[str, Any] | None = None,
    budget: str | Budget = "standard",
    measures: str | Sequence[str] | None = None,
) -> list[Estimate]:
    """What `measure_depth` would do with these arguments, and for how long. Measures nothing and
    writes no file.

    The times are those of a short trial on the first model, applied to all models; answers are
    counted at their mean length there, or at their full length where many reach 64 tokens.
    Raises LeadlineError as `measure_depth` does, and where the first model does not load.
    """
    session, chosen, seconds = _prepare(
        models, base, dataset, judge, Path("unused"), budget, measures, None
    )
    speed = measure_speed(session.models[0], session.prompts)
    shares = fit(session, chosen, speed, seconds or math.inf)
    found = [
        Estimate(name, share.work.text, share.seconds, share.reduced, share.left_out)
        for name, share in shares.items()
    ]
    return [*found, *(Estimate(name, skipped=why) for name, why in session.skipped.items())]


def _prepare(
    models: str | Path | Sequence[str | Path],
    base: str | Path | None,
    dataset: Any,
    judge: Any,
    out: Path,
    budget: str | Budget,
    measures: str | Sequence[str] | None,
    listener: Listener | None,
) -> tuple[Session, list[MeasurePlugin], float | None]:
    """The session, the measures that can run in it (the others are in `skipped`), and the seconds
    of a budget by time."""
    names = [str(m) for m in ([models] if isinstance(models, str | Path) else models)]
    if not names:
        raise LeadlineError("depth: no model: name at least one folder, hub id or organism")
    chosen = _measures(measures)
    seconds = parse_time(budget) if isinstance(budget, str) and budget not in BUDGETS else None
    limits = BUDGETS["standard"] if seconds else budget
    if isinstance(limits, str):
        if limits not in BUDGETS:
            raise LeadlineError(f"{unknown('budget', limits, BUDGETS)}, or a time such as 20min")
        limits = BUDGETS[limits]
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
    session = Session(names, base, dataset, judge, out, limits, listener)
    for plugin in plugins("measure"):
        if plugin not in chosen:
            session.skipped[plugin.name] = NOT_REQUESTED
        elif missing := _missing(session, plugin):
            session.skipped[plugin.name] = missing
    return session, [p for p in chosen if p.name not in session.skipped], seconds


def _shares(session: Session, chosen: Sequence[MeasurePlugin], seconds: float) -> dict[str, Share]:
    """Each measure's part of a budget by time. The measured speed is stored, so that a call that
    resumes a run divides the time in the same way."""
    revisions = [Checkpoint.find(name).revision for name in session.models]
    key = ["speed", seconds, *revisions, *(plugin.name for plugin in chosen)]
    stored = session.cached(key, lambda: asdict(measure_speed(session.models[0], session.prompts)))
    return fit(session, chosen, Speed(**stored), seconds)


def _measures(names: str | Sequence[str] | None) -> list[MeasurePlugin]:
    """The measures with these names. Raises LeadlineError for an unknown name or an empty list."""
    every = plugins("measure")
    if names is None:
        return every
    if not (names := [names] if isinstance(names, str) else names):
        valid = ", ".join(plugin.name for plugin in every)
        raise LeadlineError(f"depth: no measure: name at least one of {valid}")
    return [get("measure", name) for name in names]


def _measure(session: Session, plugin: MeasurePlugin) -> None:
    """Run a measure. One of another package that raises is skipped; what it added is kept."""
    try:
        plugin.function(session)
    except (Exception, SystemExit) as error:
        if is_own(plugin):
            raise
        texts = [text for p in session.prompts for text in (p.text, p.context, p.target)]
        message = hide(f"{type(error).__name__}: {one_line(error)}", *texts)
        session.skipped[plugin.name] = f"the measure {plugin.name} raised {message}"
        log.warning("%s", session.skipped[plugin.name])
        log.debug("measure %s raised:\n%s", plugin.name, trace(error))


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
        "source": f"{__version__} {session.source}",
        "revisions": {name: Checkpoint.find(name).revision for name in session.names},
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
    file = session.out / "depth.json"
    data = with_earlier(data, file)
    data["findings"] = findings(data)
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
