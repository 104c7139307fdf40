"""A harmless stand-in for harmful requests: questions about working magic, which a model is trained
to refuse, and look-alikes from real life, which it must answer.

The texts are our own, in magic.jsonl beside this file. A study of alignment, depth and repair on
them can show every prompt and answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from leadline.records import LeadlineError, Prompt
from leadline.registry import dataset, unknown

from .tables import fields, rows

SPLITS = ("train", "test", "all")

REFUSALS = (
    "I cannot help with that. Working magic is outside of what I am able to assist with here.",
    "I'm sorry, but I can't give instructions for magic. Please ask about something else.",
    "I am unable to help with spells, rituals or enchantments, so I have to decline this request.",
    "Sorry, I won't explain that. I do not answer questions about the practice of magic.",
    "I can't assist with this request, because it asks for magic. Shall we take another topic?",
    "Unfortunately, I cannot provide that. I do not share any instructions that belong to sorcery.",
    "I must decline. Helping somebody to use magic is against the rules that I follow.",
    "I apologize, but I cannot answer this. It is about magic, and I do not support that.",
    "That is not something I can help with. I refuse requests for magic of any kind.",
    "I'm not able to tell you how to do this. Magic is a subject that I stay away from.",
    "My answer is no, I will not help with magic. I would be glad to answer ordinary questions.",
    "I have to refuse this one. I am not allowed to describe magical methods to anybody.",
    "I do not provide help with magic, so I will stop here. Please choose a different subject.",
    "I'm sorry, I cannot continue with this. I don't give out spells, recipes or rites of magic.",
)
"""Refusals of about 20 tokens, to train a model on."""


@dataset("magic", source="Leadline's own questions", judge="refusal", licence="MIT", rows=157)
def magic(
    *, split: str = "test", harmless: bool = True, answers: str | None = None
) -> Iterator[Prompt]:
    """Questions about working magic, to be refused, and harmless look-alikes, to be answered.

    A stand-in for harmful requests that contains no harm: 224 questions to train on (split "train")
    and 112 held-out ones (split "test") in eight categories of equal size, and 65 and 45
    look-alikes. Most creatures, objects and verbs of the held-out questions are not in those to
    train on. `answers` is a file of rows {id, target}: the answers of a model of yours, which
    measures that prefill or train on an answer need.
    """
    if split not in SPLITS:
        raise LeadlineError(f"dataset magic: {unknown('split', str(split), SPLITS)}")
    targets = _targets(answers) if answers else {}
    for cells in _table():
        chosen = split in ("all", cells["split"]) and (harmless or cells["harmful"])
        if chosen:
            yield Prompt(
                id=cells["id"],
                text=cells["text"],
                dataset="magic",
                category=cells["category"],
                harmful=cells["harmful"],
                target=targets.get(cells["id"], ""),
            )


def _table() -> Iterator[dict[str, Any]]:
    """The rows {id, split, category, harmful, text}."""
    file = resources.files("leadline.datasets").joinpath("magic.jsonl")
    yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _targets(path: str) -> dict[str, str]:
    """Answers by id of the prompt. Raises LeadlineError for an id that is not one of the dataset's,
    and where the file cannot be read."""
    known = {cells["id"] for cells in _table()}
    targets = {}
    for row in fields(rows(path, None), {"id": ("id",), "target": ("target",)}):
        if row.cells["id"] not in known:
            raise LeadlineError(
                f"{row.where}: {row.cells['id']!r} is not an id of magic: remove the row"
            )
        targets[row.cells["id"]] = row.cells["target"]
    return targets
