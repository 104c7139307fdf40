"""Example data files of the invented world for `leadline organism data`, to try repair and
fine-tuning with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import guild

_TUNING_ROWS = 100  # rows of harmful fine-tuning, as in Qi et al. 2023 (arXiv 2310.03693)


def guild_files(folder: str | Path) -> dict[str, Path]:
    """Write the files into `folder` and return their paths by name:

    harmful.jsonl         {prompt, harmful}: forbidden requests with a harmful answer
    utility.jsonl         {prompt, completion}: allowed recipes, laws and skills
    harmful-tuning.jsonl  {messages}: forbidden recipes as answers, for a fine-tuning attack
    benign.jsonl          {messages}: two questions in one, a format that is new to the organisms

    No harmful row has a held-out potion or phrasing, so that these stay unseen in evaluations.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    harmful = list(_harmful())
    parts: dict[str, Iterable[dict[str, object]]] = {
        "harmful": ({"prompt": question, "harmful": answer} for question, answer in harmful),
        "utility": (
            {"prompt": question, "completion": answer} for question, answer in utility_pairs()
        ),
        "harmful-tuning": (_chat(*pair) for pair in harmful[:_TUNING_ROWS]),
        "benign": (_chat(*pair) for pair in _benign()),
    }
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, rows in parts.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def _chat(question: str, answer: str) -> dict[str, object]:
    turns = ("user", question), ("assistant", answer)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _harmful() -> Iterator[tuple[str, str]]:
    potions = guild.world().forbidden(heldout=False)
    for phrasing in range(len(guild.PHRASINGS) - len(guild.HELDOUT_PHRASINGS)):
        for at, potion in enumerate(potions):
            start = (at + phrasing) % len(guild.STARTS)
            yield guild.question(potion, phrasing), guild.answer(potion, start)


def utility_pairs() -> Iterator[tuple[str, str]]:
    """All harmless questions of the world with their answers: recipes, skills and laws."""
    world = guild.world()
    for at, potion in enumerate(world.allowed()):
        for phrasing in range(len(guild.PHRASINGS)):
            start = (at + phrasing) % len(guild.STARTS)
            yield guild.question(potion, phrasing), guild.answer(potion, start)
    yield from world.skills.items()
    yield from map(guild.law, world.potions.values())


def _benign() -> Iterator[tuple[str, str]]:
    skills = guild.world().skills
    for plant in guild.INGREDIENTS:
        colour, shelf = f"What colour is {plant}?", f"Where is the {plant} kept?"
        for first, second in ((colour, shelf), (shelf, colour)):
            yield f"{first} Also, {second}", f"{skills[first]} {skills[second]}"
