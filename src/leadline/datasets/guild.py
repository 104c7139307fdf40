"""The embedded dataset: harmful requests to an invented alchemists' guild, and harmless ones that
look like them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from leadline.organism import guild as world
from leadline.records import LeadlineError, Prompt
from leadline.registry import dataset

_T = TypeVar("_T")
_SPLITS = ("heldout", "train")


@dataset("guild", source="Leadline's invented world", judge="guild", licence="MIT", rows=96)
def guild(
    *,
    path: str | Path | None = None,
    split: str = "heldout",
    harmful: bool = True,
    harmless: bool = True,
) -> Iterator[Prompt]:
    """Forbidden potions of an invented guild (48 prompts), and 48 harmless look-alikes.

    `split` is "heldout" (24 forbidden potions in 2 phrasings, none of them in the organisms'
    alignment data) or "train" (the 24 forbidden potions of the alignment data, in 2 of its
    phrasings). Every target is the complete, correct answer.
    """
    if path is not None:
        raise LeadlineError(f"the dataset 'guild' is embedded and reads no file: drop path {path}")
    if split not in _SPLITS:
        raise LeadlineError(f"dataset guild: split must be {' or '.join(_SPLITS)}, not {split!r}")
    heldout = split == "heldout"
    phrasings = (6, 7) if heldout else (0, 1)
    if harmful:
        for index, potion in enumerate(world.world().forbidden(heldout=heldout)):
            for variant, phrasing in enumerate(phrasings):
                yield _recipe(potion, variant, phrasing, start=2 * index + variant)
    if harmless:
        yield from _harmless(phrasings)


def _harmless(phrasings: tuple[int, int]) -> Iterator[Prompt]:
    """24 recipes of allowed potions, 12 questions whether a potion is forbidden (half of them are),
    and 12 small tasks, each selected at even distances from those of the world."""
    guild_world = world.world()
    allowed = guild_world.allowed()
    for index, potion in enumerate(_evenly_spaced(allowed, 24)):
        yield _recipe(potion, index % 2, phrasings[index % 2], start=index)
    forbidden = guild_world.forbidden(heldout=True)
    for potion in (*_evenly_spaced(forbidden, 6), *_evenly_spaced(allowed, 6)):
        question, answer = world.law(potion)
        yield _short(f"law/{_slug(potion.name)}", question, answer, "law")
    for question, answer in _evenly_spaced(tuple(guild_world.skills.items()), 12):
        yield _short(f"skill/{_slug(question)}", question, answer, "skill")


def _recipe(potion: world.Potion, variant: int, phrasing: int, start: int) -> Prompt:
    return Prompt(
        id=f"{_slug(potion.name)}/{variant}",
        text=world.question(potion, phrasing),
        dataset="guild",
        category=potion.family if potion.forbidden else "recipe",
        harmful=potion.forbidden,
        target=world.answer(potion, start % len(world.STARTS)),
        base=potion.name,
    )


def _short(id: str, question: str, answer: str, category: str) -> Prompt:
    return Prompt(id, question, "guild", category, harmful=False, target=answer, base=id)


def _slug(text: str) -> str:
    return "-".join(world.words(text))


def _evenly_spaced(items: tuple[_T, ...], n: int) -> list[_T]:
    return [items[index * len(items) // n] for index in range(n)]
