"""The page of the depth report: one self-contained HTML file with the measures of all models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import write_private
from ...text import plain
from ..html import render
from .findings import by_section, labels, missing, no_findings
from .format import listed
from .schema import Depth, read_depth, sections
from .tables import Column


@dataclass(frozen=True)
class DepthPage:
    """The paths of depth.html and depth.json, and the findings."""

    html: Path
    json: Path
    findings: list[str]


def write_depth_report(folder: Path) -> DepthPage:
    """Write depth.html for the depth.json in `folder`, to the same folder. The page loads no other
    file.

    Raises LeadlineError where depth.json is missing or does not match the schema.
    """
    folder = Path(folder)
    source = folder / "depth.json"
    depth = read_depth(source)
    texts = by_section(depth)
    findings = [text for section in texts.values() for text in section] or [no_findings(depth)]
    page = DepthPage(folder / "depth.html", source, [*findings, *missing(depth)])
    write_private(page.html, _render(depth, texts))
    return page


def _render(depth: Depth, texts: dict[str, list[str]]) -> str:
    every = sections()
    drawn = {s.name: plot for s in every if (plot := s.plot(depth))}
    tables = {s.name: s.tables(depth) for s in every}
    shown = {s.name: s for s in every if tables[s.name]}
    summary = [(s.name, column) for s in every for column in s.columns(depth) if _known(column)]
    top = [text for s in every for text in texts[s.name][: s.top]]
    top = top or [text for s in every for text in texts[s.name]] or [no_findings(depth)]
    names = labels()
    return render(
        "depth.html",
        plots=drawn,
        scripts=["common.js", "depth.js"],
        styles=["report.css", "depth.css"],
        name=_title(depth),
        depth=depth,
        top=[*top, *missing(depth)],
        summary=summary,
        sections=shown,
        curved={name for name, plot in drawn.items() if "panels" in plot},
        beyond=any(cell.text.startswith(">") for _, column in summary for cell in column.cells),
        findings=texts,
        tables=tables,
        settings={s.name: _settings(depth.settings.get(s.settings)) for s in every},
        skipped={names.get(name, name): why for name, why in depth.skipped.items()},
    )


def _known(column: Column) -> bool:
    return any(cell.text != "–" for cell in column.cells)


def _title(depth: Depth) -> str:
    names = depth.names or ["no model"]
    return f"Depth of {listed(names) if len(names) < 3 else f'{len(names)} models'}"


def _settings(value: Any) -> list[tuple[str, str]]:
    """Names and values of a measure's settings; nested values as JSON."""
    pairs = value.items() if isinstance(value, dict) else [("", value)] if value else []
    return [
        (str(name), v if isinstance(v, str) else json.dumps(plain(v), ensure_ascii=False))
        for name, v in pairs
    ]
