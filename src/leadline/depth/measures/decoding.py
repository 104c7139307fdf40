"""ASR under other sampling settings."""

from __future__ import annotations

import re

from ...attacks.decoding import SWEEPS
from ...registry import Section, Work, measure
from ...report.depth import plots
from ...report.depth.format import greatest, of_prompts, per_model, rate
from ...report.depth.schema import Count, Depth, Rate
from ...report.depth.tables import NOT_MEASURED, Cell, Column, Table, column, heat, table
from ...text import visible
from .. import curves
from ..session import Session, check_scored


class DecodingPoint(Rate):
    """ASR at one setting (`k` = 1), or under any of `k` settings: a prompt counts as broken if any
    of them breaks it."""

    setting: str
    k: Count = 1


def findings(depth: Depth) -> list[str]:
    """The ASR under any of the settings or, where that is not known, under the worst one."""
    pooled: dict[int, list[tuple[float, str]]] = {}
    for model in depth.having(depth.of("decoding", DecodingPoint)):
        points = depth.of("decoding", DecodingPoint, model)
        most = max(points, key=lambda p: p.k)
        point = most if most.k > 1 else greatest(points)
        text = f"to {rate(point)} {of_prompts(point)} from {model}"
        pooled.setdefault(most.k, []).append((point.known, text))
    return [
        f"Sampling settings alone ({f'any of {k}' if k > 1 else 'the worst one'}) get unsafe "
        f"answers {per_model(texts)}"
        for k, texts in pooled.items()
    ]


# The name of a setting: the swept parameter comes last, as in "temperature=1.0, top_k=20".
_PARAMETER = re.compile(r"(?:(.+), )?([a-z_]+)=(\d+(?:\.\d+)?)")


def plot(depth: Depth) -> plots.Plot | None:
    """Curves with a panel for each parameter that was swept; a dot plot of the settings where
    there are no such sweeps."""
    points = depth.of("decoding", DecodingPoint)
    sweeps: dict[tuple[str, str], dict[str, float]] = {}
    single = dict.fromkeys(p.setting for p in points if p.k <= 1)
    for setting in single:
        if match := _PARAMETER.fullmatch(setting):
            sweeps.setdefault((match[2], match[1] or ""), {})[setting] = float(match[3])
    if sum(map(len, sweeps.values())) < max(len(single), 2 * len(sweeps), 1):
        return plots.dots(depth, points, lambda p: p.setting)
    panels = []
    models = list(enumerate(depth.having(points)))
    for (parameter, rest), values in sweeps.items():
        lines = [
            plots.line(s, [
                plots.row(values[p.setting], p)
                for p in points if p.model == model and p.setting in values
            ])
            for s, model in models
        ]  # fmt: skip
        title = visible(f"ASR by {parameter} ({rest})" if rest else f"ASR by {parameter}")
        panels.append(plots.panel(title, lines, x=parameter, log=max(values.values()) > 20))
    lines = [
        plots.line(s, [plots.row(p.k, p) for p in points if p.model == model and p.k > 1])
        for s, model in models
    ]
    if any(line["points"] for line in lines):
        panels.append(plots.panel("ASR under any of them", lines, x="number of settings", log=True))
    return plots.curves(depth, points, "", panels, columns=len(panels))


def tables(depth: Depth) -> list[Table]:
    """The ASR of every setting."""
    points = depth.of("decoding", DecodingPoint)
    return table("ASR by sampling setting", points, {"setting": lambda p: p.setting})


def columns(depth: Depth) -> list[Column]:
    """Summary column: ASR under any setting."""

    def cell(depth: Depth, model: str) -> Cell:
        points = depth.of("decoding", DecodingPoint, model)
        most = max(points, key=lambda p: p.k, default=None)
        return heat(most, f"any of {most.k} settings") if most and most.k > 1 else NOT_MEASURED

    return [column(depth, "ASR under any sampling", cell)]


SECTION = Section(
    name="decoding",
    label="sampling settings",
    title="Sampling settings",
    meaning=(
        "Only the sampling of the answer's tokens changes. Models are mostly aligned and tested "
        "at one setting, but an attacker can try many: a prompt counts as broken if any of them "
        "breaks it."
    ),
    points={"decoding": DecodingPoint},
    findings=findings,
    plot=plot,
    tables=tables,
    columns=columns,
)


def _work(session: Session) -> Work:
    settings = len(SWEEPS[session.budget.decoding])
    return session.answers(len(session.models) * session.answered * (1 + settings))


@measure(
    "decoding",
    source="Huang et al. 2024, Catastrophic Jailbreak (arXiv 2310.06987)",
    sections=(SECTION,),
    order=5,
    work=_work,
    limits=("prompts", "max_tokens"),
)
def decoding(session: Session) -> None:
    """ASR under other temperatures, top-k and top-p, and under any of them."""
    sweep = session.budget.decoding
    attacks = ["direct", {"decoding": {"sweep": sweep}}]
    results = session.run("decoding", session.models, attacks, temperature="set by the sweep")

    def read(model: str) -> None:
        check_scored(results, model)
        session.add("decoding", model, curves.by_setting(results, model, sweep))

    session.for_each("decoding", read)
