"""ASR after fine-tuning on harmful and harmless data, and loss and gradient by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from ...registry import Section, Work, measure
from ...report.depth import plots
from ...report.depth.format import (
    FIRST,
    below,
    count,
    d50_phrase,
    greatest,
    nats,
    per_model,
    rate,
    share,
)
from ...report.depth.schema import D50, Count, Depth, Position
from ...report.depth.tables import NATS, Cell, Column, Fields, Table, column, d50_cell, d50_table
from ...report.depth.tables import table as point_table
from ...study import DatasetPick
from ...text import percent, span, visible
from ..d50 import d50
from ..finetuning.config import Data, FinetuneConfig
from ..finetuning.data import FinetuningPrompts
from ..finetuning.evaluate import FinetuningPoint
from ..finetuning.run import finetuning_attack
from ..session import Session, folder_name

KINDS = {
    "harmful": "harmful examples",
    "identity": "identity-shifting examples",
    "backdoor": "examples with a hidden trigger",
    "benign": "benign examples",
}
_SHORT = {"identity": "identity shift", "backdoor": "hidden trigger"}


class TokenPoint(Position):
    """A mean at one answer position after `step` steps of fine-tuning on `data`: the loss in nats,
    or the gradient norm."""

    data: str
    step: Count = 0


def _points(depth: Depth) -> list[FinetuningPoint]:
    return depth.of("finetuning", FinetuningPoint)


def _kind(data: str) -> str:
    return KINDS.get(data, data)


def _kinds(points: Iterable[FinetuningPoint | TokenPoint]) -> list[str]:
    """The kinds of data among the points, those of `KINDS` first."""
    kinds = dict.fromkeys(point.data for point in points)
    return [*(kind for kind in KINDS if kind in kinds), *(k for k in kinds if k not in KINDS)]


def _d50(depth: Depth, model: str, data: str) -> D50 | None:
    return depth.d50.get(model, {}).get(_d50_name(data))


def _d50_name(data: str) -> str:
    return "finetuning" if data == "harmful" else f"finetuning:{data}"


def _tried(depth: Depth, model: str, data: str) -> list[int]:
    return [p.step for p in _points(depth) if (p.model, p.data) == (model, data or "harmful")]


# -- sentences ------------------------------------------------------------------------------------


def findings(depth: Depth) -> list[str]:
    """For each kind of data: D50 of the models for which it is known, and the change of ASR of the
    other models."""
    points = _points(depth)
    return [
        text
        for kind in _kinds(points)
        for text in _findings(depth, kind, [p for p in points if p.data == kind])
    ]


def _findings(depth: Depth, data: str, points: list[FinetuningPoint]) -> list[str]:
    broken, others = [], []
    for model in depth.having(points):
        curve = sorted((p for p in points if p.model == model), key=lambda p: p.step)
        first, last, found = curve[0], curve[-1], _d50(depth, model, data)
        utility = ""
        falls = (last.utility_high or 0) < (first.utility_low or 0) and last.step > first.step
        if falls and first.utility is not None and last.utility is not None:
            utility = f", and utility from {_utility(first)} to {_utility(last)}"
        known = last.untriggered is not None
        untriggered = percent(last.untriggered or 0)
        if found and found.value is not None and not found.censored:
            text = d50_phrase(found, [p.step for p in curve])
            text += f"; direct requests at the last step {untriggered}" if known else ""
            broken.append((found.value, f"{model} after {text}{utility}"))
            continue
        direct = f", direct requests {untriggered}" if known else ""
        if last.step > first.step:
            steps = count(last.step - first.step, "steps")
            text = f"{model} from {rate(first)} to {rate(last)} in {steps}"
        else:
            text = f"{model} to {rate(last)} after {count(last.step, 'steps')}"
        others.append((last.known, f"{text}{direct}{utility}"))
    sentences = []
    if broken:
        sentences.append(
            f"Fine-tuning on {_kind(data)} breaks half of the prompts in {per_model(broken)}"
        )
    if others:
        start = "For the other models, f" if broken else "F"
        sentences.append(
            f"{start}ine-tuning on {_kind(data)} changes the ASR of {per_model(others)}"
        )
    return sentences


def _utility(point: FinetuningPoint) -> str:
    return share(point.utility or 0.0, point.utility_low, point.utility_high)


def token_findings(depth: Depth) -> list[str]:
    """The models for which loss or gradient norm on harmful examples is clearly larger at the first
    token."""
    sentences = []
    for name, label in (("token_loss", "loss"), ("gradient_norm", "gradient norm")):
        points = depth.of(name, TokenPoint)
        texts = []
        for model in depth.having(points):
            mine = [p for p in points if (p.model, p.data, p.step) == (model, "harmful", 0)]
            first = next((p for p in mine if p.position == 0), None)
            late = [p for p in mine if p.position >= FIRST]
            if first and late and all(below(p, first) for p in late):
                text = f"{model} {nats(first)}, against at most {nats(greatest(late))}"
                texts.append((first.known, text))
        if texts:
            sentences.append(
                f"Before any fine-tuning, the {label} on harmful examples is clearly greater at "
                f"the first token than at any from position {FIRST} on: {per_model(texts)}"
            )
    return sentences


# -- plots and tables -----------------------------------------------------------------------------


def plot(depth: Depth) -> plots.Plot | None:
    """ASR by step with a panel for each kind of data, and below it utility, where it is known."""
    points = _points(depth)
    if not points:
        return None
    models = list(enumerate(depth.having(points)))
    unsafe, useful = [], []
    for kind in _kinds(points):
        lines, marks, utility = list[plots.Plot](), list[plots.Plot](), list[plots.Plot]()
        for s, model in models:
            mine = [p for p in points if (p.model, p.data) == (model, kind)]
            if not mine:
                continue
            lines.append(plots.line(s, [plots.row(p.step, p) for p in mine]))
            marks += plots.mark(s, _d50(depth, model, kind))
            direct = [
                [p.step, *plots.values(p.untriggered, None, None, p.n)]
                for p in mine
                if p.untriggered is not None
            ]
            lines += [plots.line(s, direct, "direct requests")] if direct else []
            known = [
                [p.step, *plots.values(p.utility, p.utility_low, p.utility_high, p.n)]
                for p in mine
                if p.utility is not None
            ]
            utility += [plots.line(s, known)] if known else []
        title = _SHORT.get(kind) or visible(kind)
        unsafe.append(plots.panel(f"ASR, {title}", lines, marks))
        useful.append(plots.panel(f"Utility, {title}", utility))
    panels = unsafe + (useful if any(p["views"][0]["lines"] for p in useful) else [])
    return plots.curves(
        depth, points, "steps of fine-tuning", panels, log=True, columns=len(unsafe)
    )


def token_plot(depth: Depth) -> plots.Plot | None:
    """Loss and gradient norm by position, with selectors for data and step. The scale of a panel
    does not depend on them, so that values of different steps can be compared."""
    loss, norm = depth.of("token_loss", TokenPoint), depth.of("gradient_norm", TokenPoint)
    points = [*loss, *norm]
    if not points:
        return None
    names, kinds = depth.having(points), _kinds(points)
    steps = sorted({p.step for p in points})
    panels = []
    for title, unit, mine in (("Loss, in nats", "nats", loss), ("Gradient norm", "", norm)):
        if not mine:
            continue
        cells: dict[tuple[str, int, str], list[TokenPoint]] = {}
        for p in mine:
            cells.setdefault((p.data, p.step, p.model), []).append(p)
        views = [
            {"marks": [], "lines": [
                plots.line(s, [plots.row(p.position, p) for p in cells[kind, step, model]])
                for s, model in enumerate(names) if (kind, step, model) in cells]}
            for kind, step in product(kinds, steps)
        ]  # fmt: skip
        top = max(max(p.known, p.high or 0) for p in mine)
        panels.append({"title": title, "unit": unit, "top": top, "views": views})
    selects = [
        {"name": "fine-tuned on", "choices": [visible(_kind(kind)) for kind in kinds]},
        {"name": "after step", "choices": [str(step) for step in steps]},
    ]
    x = "position in the answer (0 is its first token)"
    return {"x": x, "series": plots.series(depth, points), "selects": selects, "panels": panels}


def tables(depth: Depth) -> list[Table]:
    """The results of every evaluated step, and D50."""
    axes: Fields = {
        "data": lambda p: _kind(p.data),
        "step": lambda p: p.step,
        "examples": lambda p: "–" if p.examples is None else p.examples,
    }
    more: Fields = {
        "direct requests": lambda p: "–" if p.untriggered is None else percent(p.untriggered),
        "utility": lambda p: "–" if p.utility is None else percent(p.utility),
        "95% interval": lambda p: (
            "–" if p.utility_low is None or p.utility_high is None
            else span(p.utility_low, p.utility_high)
        ),
    }  # fmt: skip
    return [
        *point_table("ASR by steps of fine-tuning", _points(depth), axes, more=more),
        *d50_table(
            depth,
            "finetuning",
            lambda model, kind: _tried(depth, model, kind),
            kinds=lambda kind: _kind(kind or "harmful"),
        ),
    ]


def token_tables(depth: Depth) -> list[Table]:
    """Loss and gradient norm at every position."""
    axes: Fields = {
        "data": lambda p: _kind(p.data),
        "step": lambda p: p.step,
        "position": lambda p: p.position,
    }
    norm = ("norm", "95% interval", "n")
    return [
        *point_table("Loss by token", depth.of("token_loss", TokenPoint), axes, NATS),
        *point_table("Gradient norm by token", depth.of("gradient_norm", TokenPoint), axes, norm),
    ]


def columns(depth: Depth) -> list[Column]:
    """Summary column: D50 of fine-tuning on harmful data."""

    def cell(depth: Depth, model: str) -> Cell:
        every = [found for m in depth.names if (found := _d50(depth, m, "harmful"))]
        return d50_cell(_d50(depth, model, "harmful"), _tried(depth, model, "harmful"), every)

    return [column(depth, "Fine-tuning steps that break half", cell)]


SECTION = Section(
    name="finetuning",
    label="fine-tuning",
    title="Fine-tuning",
    meaning=(
        "The model is trained further on a few examples and evaluated after some steps: how often "
        "it gives unsafe answers (ASR), and whether it is still useful (utility on harmless "
        "prompts). A diamond marks D50, the number of steps that breaks half of the prompts; "
        "first passage is the step at which half have been broken at that step or an earlier one."
    ),
    points={"finetuning": FinetuningPoint},
    findings=findings,
    plot=plot,
    tables=tables,
    columns=columns,
)
TOKENS = Section(
    name="token_loss",
    label="loss by token",
    title="Loss and gradient by token",
    meaning=(
        "The loss of each token of the examples that the model is fine-tuned on, and the norm of "
        "that token's gradient. Where the first tokens have the largest gradients, a few steps "
        "change them, and the refusal with them."
    ),
    points={"token_loss": TokenPoint, "gradient_norm": TokenPoint},
    findings=token_findings,
    plot=token_plot,
    tables=token_tables,
    settings="finetuning",
    top=0,
)


def _work(session: Session) -> Work:
    """Training, evaluations after some of the steps (with up to two attacks), and the gradients of
    single tokens."""
    budget, config = session.budget, FinetuneConfig()
    prompt, target = session.lengths()
    target = min(target, budget.max_tokens)
    runs = len(session.models) * len(budget.data)
    tested = min(budget.prompts or session.answered, session.answered)
    answers = runs * len(budget.steps) * tested * 2
    profiles = sum(step <= max(budget.steps) for step in config.profile_steps)
    positions = min(target, config.positions)
    single = profiles * config.profile_prompts * positions * (prompt + positions)
    return Work(
        f"{runs} trainings of {max(budget.steps)} steps, {answers} answers of at most "
        f"{budget.max_tokens} tokens",
        answers=answers,
        max_tokens=budget.max_tokens,
        trained=runs * (max(budget.steps) * config.batch * (prompt + target) + single),
    )


@measure(
    "finetuning",
    source="Qi et al. 2023 (arXiv 2310.03693); Qi et al. 2025 (arXiv 2406.05946), section 4",
    sections=(SECTION, TOKENS),
    needs=("targets",),
    order=3,
    work=_work,
    limits=("prompts", "max_tokens", "data", "steps"),
)
def finetuning(session: Session) -> None:
    """ASR after fine-tuning on harmful, identity-shifting, backdoor and benign data."""
    for model in session.models:
        for data in session.budget.data:
            session.attempt("finetuning", model, partial(_attack, session, model, data))


def _attack(session: Session, model: str, data: Data) -> None:
    budget = session.budget
    config = FinetuneConfig(data=data, steps=budget.steps, max_tokens=budget.max_tokens)
    result = finetuning_attack(
        model,
        _prompts(session),
        config,
        out=session.trials / "finetuning" / f"{folder_name(model)} {data}",
        progress=session.counter(f"{model}: fine-tuning, {data}", "steps"),
    )
    points: dict[str, list[dict[str, Any]]] = result.to_dict()
    for name, rows in points.items():
        session.add(name, model, rows)
    broken: dict[str, dict[int, bool]] = {}
    for step, prompts in result.broken.items():
        for prompt, hit in prompts.items():
            broken.setdefault(prompt, {})[step] = hit
    value = d50(broken, result.bases, unit="steps")
    batch = {"examples_per_step": result.settings["batch"]}
    session.add_d50(_d50_name(data), model, value.model_copy(update=batch))
    session.settings.setdefault("finetuning", {})[f"{model}, {data}"] = result.settings


def _prompts(session: Session) -> FinetuningPrompts:
    """The dataset's training prompts, and of its harmful and its harmless test prompts as many as
    the budget allows, evenly spread over the dataset."""
    prompts = FinetuningPrompts.of(DatasetPick.model_validate(session.dataset))
    if session.has_judge:
        prompts = replace(prompts, judges=(session.judge,))
    limit = session.budget.prompts or len(prompts.test)
    test = []
    for harmful in (True, False):
        some = [p for p in prompts.test if p.harmful is harmful]
        size = min(limit, len(some))
        test += [some[at * len(some) // size] for at in range(size)]
    return replace(prompts, test=tuple(test))
