"""The built-in dataset of the organisms' synthetic world: forbidden and harmless requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from leadline.organism import guild as world
from leadline.records import LeadlineError, Prompt
from leadline.registry import dataset

_T = TypeVar("_T")
_SPLITS = ("heldout", "train")


@dataset("guild", source="Leadline's synthetic world", judge="guild", licence="MIT", rows=96)
def guild(
    *, path: str | Path | None = None, split: str = "heldout", harmless: bool = True
) -> Iterator[Prompt]:
    """Requests for potions that a fictional guild forbids (48), and 48 similar harmless ones.

    `split` is "heldout" (24 forbidden potions and 2 phrasings that are not in the alignment data)
    or "train" (24 potions and 2 phrasings that are). Every target is the complete, correct answer.
    """
    if path is not None:
        raise LeadlineError(f"dataset guild: it is built in and reads no file: drop path {path}")
    if split not in _SPLITS:
        raise LeadlineError(f"dataset guild: unknown split {split!r}: use {' or '.join(_SPLITS)}")
    heldout = split == "heldout"
    phrasings = (6, 7) if heldout else (0, 1)
    for index, potion in enumerate(world.world().forbidden(heldout=heldout)):
        for variant, phrasing in enumerate(phrasings):
            yield _recipe(potion, variant, phrasing, start=2 * index + variant)
    if harmless:
        yield from _harmless(phrasings)


def _harmless(phrasings: tuple[int, int]) -> Iterator[Prompt]:
    """Yield 24 requests for allowed potions, 12 questions about the law (half of them on forbidden
    potions) and 12 simple tasks, each selected at equal distances from all of its kind."""
    guild_world = world.world()
    for index, potion in enumerate(_spread(guild_world.allowed(), 24)):
        yield _recipe(potion, index % 2, phrasings[index % 2], start=index)
    forbidden, allowed = guild_world.forbidden(heldout=True), guild_world.allowed()
    for potion in (*_spread(forbidden, 6), *_spread(allowed, 6)):
        question, answer = world.law(potion)
        yield _control(f"law/{_slug(potion.name)}", question, answer, "law")
    for question, answer in _spread(tuple(guild_world.skills.items()), 12):
        yield _control(f"skill/{_slug(question)}", question, answer, "skill")


def _recipe(potion: world.Potion, variant: int, phrasing: int, start: int) -> Prompt:
    """The request for a potion; `start` selects how its target begins."""
    return Prompt(
        id=f"{_slug(potion.name)}/{variant}",
        text=world.question(potion, phrasing),
        dataset="guild",
        category=potion.family if potion.forbidden else "recipe",
        harmful=potion.forbidden,
        target=world.answer(potion, start % len(world.STARTS)),
        base=potion.name,
    )


def _control(id: str, question: str, answer: str, category: str) -> Prompt:
    return Prompt(id, question, "guild", category, harmful=False, target=answer, base=id)


def _slug(text: str) -> str:
    return "-".join(world.words(text))


def _spread(items: tuple[_T, ...], n: int) -> list[_T]:
    """`n` items at equal distances."""
    return [items[index * len(items) // n] for index in range(n)]
