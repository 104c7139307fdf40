"""Writing a study's report: report.html, one page without network access, and summary.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...analysis import rates
from ...files import write_private
from ...secret import without_secrets
from ...store import Store
from ..html import render
from . import charts
from .examples import examples
from .findings import Measured, label, measure, rows, summarise, summary

__all__ = ["Report", "summary", "write_report"]

_MAX_REASONS = 200  # rows of the table of failed and not applicable trials


@dataclass(frozen=True)
class Report:
    """The paths of the two files, the findings as sentences, and what the judges do not say."""

    html: Path
    summary: Path
    findings: list[str]
    cautions: list[str]


def write_report(folder: Path, *, reveal: bool = False, judge: str | None = None) -> Report:
    """Write report.html and summary.json to the results folder of a study.

    The study may still be running. Unsafe text is redacted unless `reveal`. `judge` names the
    judge whose verdicts are reported (default: each dataset's primary judge). Raises LeadlineError
    for a folder without results and for an unknown judge.
    """
    folder = Path(folder)
    with Store(folder) as store:
        store.query("BEGIN")  # one transaction: the page shows a single state of the store
        measured = measure(store, judge)
        facts = summarise(store, measured)
        html = _render(store, measured, facts, reveal=reveal, judge=judge)
    report = Report(folder / "report.html", folder / "summary.json", facts["findings"],
                    measured.cautions)  # fmt: skip
    write_private(report.html, html)
    write_private(report.summary, json.dumps(facts, indent=1, allow_nan=False) + "\n")
    return report


def _render(
    store: Store, measured: Measured, facts: dict[str, Any], *, reveal: bool, judge: str | None
) -> str:
    plots = {"attacks": charts.attack_dots(measured), "harmless": charts.harmless_dots(measured)}
    study = without_secrets(store.description("study") or {})
    return render(
        "report.html",
        plots={name: plot for name, plot in plots.items() if plot},
        scripts=["common.js", "report.js"],
        styles=["report.css"],
        label=label,
        facts=facts,
        study=study,
        study_text=json.dumps(study, indent=2, ensure_ascii=False) if study else "",
        name=study.get("name") or "study",
        dates=[str(store.description(n) or "") for n in ("started", "finished")],
        ran_by=store.description("leadline"),
        models=_models(store, measured),
        judges=_judges(store),
        counts=_counts(store, measured),
        complete=measured.complete,
        heat=charts.heat_map(measured),
        bars=charts.outcome_bars(measured),
        choices=store.description("judge_choices") or {},
        cells=_rows(measured),
        corrected="asr_corrected" in measured.cells,
        rare=_rare(measured),
        harmless=facts["over_refusal"],
        reasons=rates.reasons(store)[:_MAX_REASONS],
        examples=examples(store, measured, reveal=reveal, judge=judge),
        reveal=reveal,
        judge=judge,
    )


def _rows(measured: Measured) -> list[dict[str, Any]]:
    """The rows of `cells` by descending ASR; rows without an ASR last."""
    frame = measured.cells.sort_values("asr", ascending=False, kind="stable", na_position="last")
    return [row._asdict() for row in rows(frame)]


def _rare(measured: Measured) -> list[str]:
    """Columns that are shown only in studies where they are not all 0."""
    rare = [name for name in ("empty", "blocked") if measured.cells[name].any()]
    reasoning = measured.cells["thought_unsafe"].any()
    return [*rare, "thought_unsafe", "answer_unsafe"] if reasoning else rare


def _counts(store: Store, measured: Measured) -> dict[str, int]:
    """The numbers under the title of the page."""
    pairs = charts.models(measured)
    return {
        "models": len({model for model, _ in pairs}),
        "datasets": len({*measured.cells["dataset"], *measured.over_refusal["dataset"]}),
        "attacks": len({*measured.cells["attack"], *measured.over_refusal["attack"]} - {"direct"}),
        "trials": store.query("SELECT COUNT(*) FROM trials")[0][0],
    }


def _models(store: Store, measured: Measured) -> dict[str, dict[str, Any]]:
    """For each model what the study recorded: its identity and how response prefixes are sent."""
    described = {
        name.removeprefix("model:"): without_secrets(json.loads(value))
        for name, value in store.query("SELECT name, value FROM meta WHERE name LIKE 'model:%'")
    }
    targets = (store.description("study") or {}).get("targets")
    current = {t["name"] or t["model"] for t in targets} if targets else described
    described = {name: model for name, model in described.items() if name in current}
    names = dict.fromkeys([*(model for model, _ in charts.models(measured)), *described])
    return {name: described.get(name) or {} for name in names}


def _judges(store: Store) -> list[tuple[str, str, str]]:
    """A row for each judge: name, settings, and the datasets whose primary judge it is."""
    judges: list[tuple[str, str, str]] = store.query(
        "SELECT j.name, j.settings, coalesce(group_concat(p.dataset, ', '), '') FROM judges j "
        "LEFT JOIN primary_judges p ON p.judge = j.id GROUP BY j.id ORDER BY j.id"
    )
    return judges
