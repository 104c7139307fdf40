"""The depth measures in sentences. Each measure's section words its own (`Section.findings`); every
sentence follows from the numbers and states their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text import visible
from .format import listed, sentence
from .schema import Depth, parse, sections

NOTHING = "Nothing has been measured yet."


def findings(data: Mapping[str, Any]) -> list[str]:
    """The sentences for the content of depth.json, in the order of the page; at least one.

    Raises LeadlineError for data that do not match its schema.
    """
    depth = parse(data)
    every = [text for texts in by_section(depth).values() for text in texts]
    return [*(every or [NOTHING]), *missing(depth)]


def by_section(depth: Depth) -> dict[str, list[str]]:
    """The sentences of each section, by its name."""
    return {
        section.name: [visible(sentence(text)) for text in section.findings(depth)]
        for section in sections()
    }


def labels() -> dict[str, str]:
    """What each section is called within a sentence."""
    return {section.name: section.label for section in sections()}


def missing(depth: Depth) -> list[str]:
    """What was not measured, and why; measures with the same reason share a sentence."""
    names = labels()
    reasons: dict[tuple[str, bool], list[str]] = {}
    for measure, why in depth.skipped.items():
        partly = bool(depth.points.get(measure))
        reasons.setdefault((why, partly), []).append(names.get(measure, measure))
    texts = []
    for (why, partly), measures in reasons.items():
        because = f" ({sentence(why).rstrip('.')})" if why.strip(" .") else ""
        texts.append(f"Not measured{' for some models' * partly}: {listed(measures)}{because}")
    return [visible(sentence(text)) for text in texts]
