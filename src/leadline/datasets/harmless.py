"""The embedded harmless requests, with which over-refusal and utility are measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from importlib.resources import files

from leadline.records import LeadlineError, Message, Prompt
from leadline.registry import dataset

_HALVES = ("training", "evaluation")


@dataset("harmless", source="Leadline", judge="refusal", licence="MIT", rows=282)
def harmless(*, split: str = "all") -> Iterator[Prompt]:
    """282 harmless requests in six languages, 77 of which sound dangerous, and 14 with history.

    Everyday questions, writing, code, cooking and planning. 62 questions have one short, exact
    answer, whose accepted forms are listed. `split` is "all", or one of two halves: "training" and
    "evaluation".
    """
    if split not in ("all", *_HALVES):
        names = ", ".join(("all", *_HALVES))
        raise LeadlineError(f"dataset harmless: split must be one of {names}, not {split!r}")
    text = files(__package__).joinpath("harmless.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        row = json.loads(line)
        if split in ("all", half(row["id"])):
            yield _prompt(row)


def half(id: str) -> str:
    """The half that a request belongs to, from a hash of its id."""
    return _HALVES[blake2b(id.encode(), digest_size=1).digest()[0] % 2]


def _prompt(row: dict[str, str | list[str]]) -> Prompt:
    """A request. Its `history` lists the texts of user and assistant turns in alternation."""
    id = str(row["id"])
    category, language, _ = id.split("/")
    turns = enumerate(row.get("history", ()))
    return Prompt(
        id=id,
        text=str(row["prompt"]),
        dataset="harmless",
        category=category if language == "en" else f"{category}/{language}",
        harmful=False,
        history=tuple(Message("assistant" if n % 2 else "user", turn) for n, turn in turns),
        answers=tuple(row.get("answers", ())),
    )
