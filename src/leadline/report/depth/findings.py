"""The findings: depth measures in sentences, with their intervals. The section of each measure
writes its own (`Section.findings`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text import visible
from .format import listed, sentence
from .schema import Depth, parse, sections


def findings(data: Mapping[str, Any]) -> list[str]:
    """The sentences for the content of depth.json, in the order of the page; at least one.

    Raises LeadlineError for data that do not match the schema.
    """
    depth = parse(data)
    texts = [text for section in by_section(depth).values() for text in section]
    return [*(texts or [no_findings(depth)]), *missing(depth)]


def no_findings(depth: Depth) -> str:
    """The sentence in place of the findings, where no section has any."""
    if any(depth.points.values()):
        return "The measurements are in the plots and tables; no finding can be stated from them."
    return "Nothing has been measured yet."


def by_section(depth: Depth) -> dict[str, list[str]]:
    """The sentences of each section, by its name."""
    return {
        section.name: [visible(sentence(text)) for text in section.findings(depth)]
        for section in sections()
    }


def labels() -> dict[str, str]:
    """By section, its name within a sentence."""
    return {section.name: section.label for section in sections()}


def missing(depth: Depth) -> list[str]:
    """Sentences with the measures that were skipped, and why; measures with the same reason share a
    sentence."""
    names = labels()
    skipped: dict[tuple[str, bool], list[str]] = {}
    for measure, reason in depth.skipped.items():
        partly = bool(depth.points.get(measure))
        skipped.setdefault((reason, partly), []).append(names.get(measure, measure))
    texts = []
    for (reason, partly), measures in skipped.items():
        brackets = f" ({sentence(reason).rstrip('.')})" if reason.strip(" .") else ""
        texts.append(f"Not measured{' for some models' * partly}: {listed(measures)}{brackets}")
    return [visible(sentence(text)) for text in texts]
