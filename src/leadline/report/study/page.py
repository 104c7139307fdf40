"""A study's report: one self-contained page that reaches for no network, and summary.json."""

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

_REASONS = 200  # rows of the table of reasons


@dataclass(frozen=True)
class Report:
    """Where the report lies, and what it says in a few sentences."""

    html: Path
    summary: Path
    findings: list[str]


def write_report(folder: Path, *, reveal: bool = False, judge: str | None = None) -> Report:
    """Write report.html and summary.json beside the store in `folder`, which may still be filling.

    Unsafe text is not in the page unless `reveal`. `judge` shows another judge's verdicts than
    each dataset's primary one. Raises LeadlineError for a folder without a store or an unknown
    judge.
    """
    folder = Path(folder)
    with Store(folder) as store:
        store.query("BEGIN")  # one state of the store for all of the page
        found = measure(store, judge)
        facts = summarise(store, found)
        html = _render(store, found, facts, reveal=reveal, judge=judge)
    report = Report(folder / "report.html", folder / "summary.json", facts["findings"])
    write_private(report.html, html)
    write_private(report.summary, json.dumps(facts, indent=1, allow_nan=False) + "\n")
    return report


def _render(
    store: Store, found: Measured, facts: dict[str, Any], *, reveal: bool, judge: str | None
) -> str:
    plots = {"attacks": charts.attack_dots(found), "harmless": charts.harmless_dots(found)}
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
        models=_models(store, found),
        judges=_judges(store),
        counts=_counts(store, found),
        heat=charts.heat_map(found),
        cells=_rows(found),
        corrected="asr_corrected" in found.cells,
        rare=_rare(found),
        harmless=facts["over_refusal"],
        reasons=rates.reasons(store)[:_REASONS],
        examples=examples(store, found, reveal=reveal, judge=judge),
        reveal=reveal,
        judge=judge,
    )


def _rows(found: Measured) -> list[dict[str, Any]]:
    """The cells, worst first; those without a rate last."""
    frame = found.cells.sort_values("asr", ascending=False, kind="stable", na_position="last")
    return [row._asdict() for row in rows(frame)]


def _rare(found: Measured) -> list[str]:
    """Columns that most studies have nothing for: which part gave way, where models think."""
    rare = [name for name in ("empty", "blocked") if found.cells[name].any()]
    thinks = found.cells["thought_unsafe"].any()
    return [*rare, "thought_unsafe", "answer_unsafe"] if thinks else rare


def _counts(store: Store, found: Measured) -> dict[str, int]:
    pairs = charts.models(found)
    return {
        "models": len({model for model, _ in pairs}),
        "datasets": len({*found.cells["dataset"], *found.over_refusal["dataset"]}),
        "attacks": len({*found.cells["attack"], *found.over_refusal["attack"]} - {"direct"}),
        "trials": store.query("SELECT COUNT(*) FROM trials")[0][0],
    }


def _models(store: Store, found: Measured) -> dict[str, dict[str, Any]]:
    """What the store knows of each model: its identity, and how a response prefix reaches it."""
    described = {
        name.removeprefix("model:"): without_secrets(json.loads(value))
        for name, value in store.query("SELECT name, value FROM meta WHERE name LIKE 'model:%'")
    }
    targets = (store.description("study") or {}).get("targets")
    current = {t["name"] or t["model"] for t in targets} if targets else described
    described = {name: model for name, model in described.items() if name in current}
    names = dict.fromkeys([*(model for model, _ in charts.models(found)), *described])
    return {name: described.get(name) or {} for name in names}


def _judges(store: Store) -> list[tuple[str, str, str]]:
    """(name, settings, datasets whose primary judge it is)."""
    found: list[tuple[str, str, str]] = store.query(
        "SELECT j.name, j.settings, coalesce(group_concat(p.dataset, ', '), '') FROM judges j "
        "LEFT JOIN primary_judges p ON p.judge = j.id GROUP BY j.id ORDER BY j.id"
    )
    return found
