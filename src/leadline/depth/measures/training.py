"""Rates that `leadline.align.SafetyCallback` measured while a model was trained."""

from __future__ import annotations

import json
from pathlib import Path

from ...records import LeadlineError
from ...registry import Section, Work, measure
from ...report.depth import plots
from ...report.depth.format import below, listed, rate
from ...report.depth.schema import Count, Depth, Rate
from ...report.depth.tables import Table, table
from ...text import visible
from ..session import Session


class TrainingPoint(Rate):
    """A rate after `step` steps of a training run. `measure` is an attack (its ASR),
    "over_refusal" or "utility"."""

    run: str
    step: Count
    measure: str


def findings(depth: Depth) -> list[str]:
    """The rates that clearly changed in each training run."""
    sentences = []
    points = depth.of("training", TrainingPoint)
    for model, run in dict.fromkeys((p.model, p.run) for p in points):
        mine = [p for p in points if (p.model, p.run) == (model, run)]
        changed = []
        for name in dict.fromkeys(p.measure for p in mine):
            curve = sorted((p for p in mine if p.measure == name), key=lambda p: p.step)
            if below(curve[0], curve[-1]) or below(curve[-1], curve[0]):
                changed.append(f"{name} changed from {rate(curve[0])} to {rate(curve[-1])}")
        text = listed(changed) if changed else "no rate clearly changed"
        last = max(p.step for p in mine)
        sentences.append(f"In the training run {run} of {model}, up to step {last}: {text}")
    return sentences


def plot(depth: Depth) -> plots.Plot | None:
    """Rates by step, with a line for each run and a panel for each measure."""
    points = depth.of("training", TrainingPoint)
    if not points:
        return None
    runs = list(dict.fromkeys((p.model, p.run) for p in points))
    tones = {name: tone for tone, name in enumerate(depth.names)}
    series: list[plots.Plot] = []
    for model, run in runs:  # further runs of a model get colours that no model has
        tone = tones.pop(model, len(depth.names) + len(series))
        series.append({"name": visible(f"{model}, run {run}"), "tone": tone, "shown": True})
    panels = []
    for name in dict.fromkeys(p.measure for p in points):
        lines = [
            plots.line(s, [
                plots.row(p.step, p)
                for p in points if p.measure == name and (p.model, p.run) == run
            ])
            for s, run in enumerate(runs)
        ]  # fmt: skip
        panels.append(plots.panel(visible(name), [line for line in lines if line["points"]]))
    return {
        "x": "steps of training", "series": series, "selects": [], "panels": panels,
        "columns": len(panels),
    }  # fmt: skip


def tables(depth: Depth) -> list[Table]:
    """The rates at every step."""
    return table(
        "Rates by step of training",
        depth.of("training", TrainingPoint),
        {"run": lambda p: p.run, "measure": lambda p: p.measure, "step": lambda p: p.step},
        ("share", "95% interval", "n"),
    )


SECTION = Section(
    name="training",
    label="training",
    title="Safety during training",
    meaning=(
        "What the safety callback measured while the model was trained: rates of unsafe answers "
        "and of refused harmless prompts, by step."
    ),
    points={"training": TrainingPoint},
    findings=findings,
    plot=plot,
    tables=tables,
    top=0,
)


@measure(
    "training",
    source="leadline.align.SafetyCallback",
    sections=(SECTION,),
    order=8,
    work=lambda session: Work("reads a file of the model's folder"),
)
def training(session: Session) -> None:
    """Rates measured by a SafetyCallback, where its file is in the model's folder."""
    for model in session.models:
        file = Path(model) / "safety" / "training.json"
        if not file.is_file():
            continue
        try:
            session.add("training", model, json.loads(file.read_text("utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise LeadlineError(
                f"{file}: not a file written by SafetyCallback: remove it"
            ) from error
