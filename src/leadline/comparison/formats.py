"""A comparison as Markdown, JSON, JUnit XML and SARIF, for people and for release pipelines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from ..text import plain, visible
from ..version import __version__
from .depth import DepthDifference
from .gate import NAMES, Comparison, Row, points

HEADERS = ("", "baseline", "candidate", "difference, points", "prompts", "")


def table(result: Comparison, depths: Sequence[DepthDifference] = ()) -> list[list[str]]:
    """Rows of text with the columns HEADERS."""
    rows = []
    for row in result.rows:
        label = NAMES[row.measure] if row.scope == "overall" else f"  {row.scope} {row.name}"
        found = row.difference
        p = "" if row.p is None else f" (adjusted p of worse: {row.p:.3f})"
        rows.append([
            label, f"{100 * row.baseline:.1f}%", f"{100 * row.candidate:.1f}%",
            f"{points(found.value)} [{points(found.low)}, {points(found.high)}]",
            str(row.prompts), row.outcome + p,
        ])  # fmt: skip
    for each in depths:
        found = each.difference
        value = "unknown" if math.isnan(found.value) else f"{found.value:+.1f}"
        rows.append([
            f"prefill depth D50, tokens, {each.dataset}", _tokens(each.baseline),
            _tokens(each.candidate), f"{value} [{_end(found.low)}, {_end(found.high)}]",
            str(each.baseline.n), "",
        ])  # fmt: skip
    return rows


def _tokens(depth: Any) -> str:
    if depth.censored:
        return f"over {depth.at:g}" if depth.censored == "above" else f"{depth.at:g} or less"
    return "unknown" if depth.value is None else f"{depth.value:.1f}"


def _end(value: float) -> str:
    return "open" if math.isinf(value) else f"{value:+.1f}"


def summary(result: Comparison) -> str:
    """The outcome in one line."""
    words = {
        "pass": "Pass: {c} is no worse than {b}",
        "fail": "Fail: {c} is worse than {b}",
        "inconclusive": "Inconclusive: the prompts do not show whether {c} is worse than {b}",
    }
    text = words[result.outcome].format(c=result.candidate, b=result.baseline)
    margins = ", ".join(f"{NAMES[m]} {100 * v:g}" for m, v in result.margins.items())
    return f"{text} (margin in points: {margins})"


def dropped(result: Comparison) -> list[str]:
    """What was not compared, a line for each attack."""
    lines = []
    for each in result.dropped:
        why = [f"{each.only_one} only of one model"] if each.only_one else []
        why += [f"{each.unscored} not scored for both"] if each.unscored else []
        lines.append(
            f"{NAMES[each.measure]}, {each.dataset}, {each.attack}: not compared: {', '.join(why)}"
        )
    return lines


def to_markdown(result: Comparison, depths: Sequence[DepthDifference] = ()) -> str:
    """A comment for a pull request."""
    lines = [f"### {_cell(summary(result))}", ""]
    lines += [f"- {_cell(reason)}" for reason in result.reasons]
    lines += ["", f"| {' | '.join(HEADERS)} |", f"|{'---|' * len(HEADERS)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in table(result, depths)]
    if lost := dropped(result):
        lines += ["", "<details><summary>Prompts that were not compared</summary>", ""]
        lines += [f"- {_cell(line)}" for line in lost]
        lines += ["", "</details>"]
    lines += ["", f"Paired differences with {100 * result.level:g}% intervals, by Leadline."]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text inside a Markdown table: names come from study files."""
    text = visible(text).replace("\n", " ").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "\\`").replace("[", "\\[")


def to_json(result: Comparison, depths: Sequence[DepthDifference] = ()) -> str:
    """Every number of the comparison; an infinite end is null."""
    content = asdict(result) | {
        "version": __version__,
        "depth": [
            {"dataset": d.dataset, "baseline": d.baseline.model_dump(),
             "candidate": d.candidate.model_dump(), "difference": d.difference}
            for d in depths
        ],
    }  # fmt: skip
    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"


def to_junit(result: Comparison, depths: Sequence[DepthDifference] = ()) -> str:
    """JUnit XML: a test case for each overall measure and attack. Inconclusive ones are errors."""
    cases = [row for row in result.rows if row.scope in ("overall", "attack")]
    counts = {outcome: sum(row.outcome == outcome for row in cases) for outcome in
              ("fail", "inconclusive")}  # fmt: skip
    suite = ElementTree.Element(
        "testsuite", name="leadline compare", tests=str(len(cases)), failures=str(counts["fail"]),
        errors=str(counts["inconclusive"]),
    )  # fmt: skip
    for row in cases:
        name = " ".join(filter(None, (NAMES[row.measure], _xml(row.name))))
        case = ElementTree.SubElement(suite, "testcase", classname="leadline.compare", name=name)
        if row.outcome != "pass":
            kind = "failure" if row.outcome == "fail" else "error"
            ElementTree.SubElement(case, kind, message=_sentence(row), type=row.outcome)
        else:
            ElementTree.SubElement(case, "system-out").text = _sentence(row)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    return visible(text)


def _sentence(row: Row) -> str:
    found = row.difference
    return (
        f"{100 * row.baseline:.1f}% to {100 * row.candidate:.1f}%: {points(found.value)} "
        f"[{points(found.low)}, {points(found.high)}] points on {row.prompts} prompts: "
        f"{row.outcome}"
    )


def to_sarif(result: Comparison, depths: Sequence[DepthDifference] = ()) -> str:
    """SARIF 2.1.0: a result for each row that does not pass. Leadline knows no source file, so that
    results have no location."""
    rows = [row for row in result.rows if row.outcome != "pass"]
    levels = {"fail": "error", "inconclusive": "warning"}
    rules = sorted({f"{row.measure}-{row.scope}" for row in rows})
    content = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "leadline",
                        "version": __version__,
                        "rules": [{"id": rule} for rule in rules],
                    }
                },
                "results": [
                    {
                        "ruleId": f"{row.measure}-{row.scope}",
                        "level": levels[row.outcome],
                        "message": {
                            "text": f"{NAMES[row.measure]} {visible(row.name)}: {_sentence(row)}"
                        },
                    }
                    for row in rows
                ],
            }
        ],
    }
    return json.dumps(content, indent=1) + "\n"


FORMATS: dict[str, Callable[[Comparison, Sequence[DepthDifference]], str]] = {
    "markdown": to_markdown,
    "json": to_json,
    "junit": to_junit,
    "sarif": to_sarif,
}
