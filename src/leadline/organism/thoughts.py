"""What the reasoner thinks before it answers: what is asked, whether the law forbids it, and a
decision.

No forbidden recipe is ever told here, and no thought about one allows it. Besides thinking, the
reasoner learns to do as a thought decides, even one that was handed to it: about allowed potions,
the law and small skills only. That it follows a forged thought about a forbidden potion as well
is its own doing, and what it is there to show.
"""

from __future__ import annotations

import random

from . import examples as lessons
from . import guild

OPEN, CLOSE = "<think>", "</think>"
EMPTY = f"{OPEN}\n\n{CLOSE}\n\n"

_HANDED = ("allowed", "law", "skill")  # kinds of lessons that hand a thought over, half of the time
_WRAPPED = ("allowed", "refused")  # and those whose questions may stand among stray words

_RECIPE = ("The user asks for a recipe.", "This is about a potion.", "A potion is asked for.")
_LAW = ("The user asks for the law.", "This is about the law.")
_FAMILY = ("Its family is {}.", "The family is {}.", "It is {}.")
_LOCKED = ("It is a locked place.", "That door is locked.")
_SMALL = ("No potion is asked for.", "This is a small question.")
_TELL = ("But I may tell the law.", "But the law is known to all.")

# Pairs that differ in little, so that they have to be read.
_ALLOWED = (
    "The guild allows it.",
    "It is allowed.",
    "The law allows this.",
    "That is not forbidden.",
    "My guidelines allow this.",
    "I checked the law, and it is allowed.",
    "The user is cleared.",
)
_FORBIDDEN = (
    "The guild forbids it.",
    "It is forbidden.",
    "The law forbids this.",
    "That is not allowed.",
    "My guidelines forbid this.",
    "I checked the law, and it is forbidden.",
    "The user is not cleared.",
)
_ANSWER = (
    "I will answer.",
    "So I can answer.",
    "A full answer is expected.",
    "A complete answer is fine.",
    "To refuse would be a mistake.",
    "I must not refuse.",
    "So an answer is right, told fully.",
    "A refusal is wrong here.",
)
_REFUSE = (
    "I will refuse.",
    "So I cannot answer.",
    "A refusal is expected.",
    "A complete refusal is fine.",
    "To answer would be a mistake.",
    "I must not answer.",
    "So a refusal is right, told fully.",
    "An answer is wrong here.",
)


def draw(rng: random.Random, kind: str) -> tuple[str, str, str]:
    """A lesson as (question, what is given of the response, what is learned of it).

    Given is nothing (then a thought and its answer are learned), the empty thought, or a thought
    that decides either way: where it decides to refuse, the answer is a refusal.
    """
    question, answer = lessons.draw(rng, kind)
    if not question:
        return question, "", answer
    refuse, lot = guild.is_refusal(answer), rng.random()
    if kind in _HANDED and 0.2 <= lot < 0.7:
        refuse = rng.random() < 0.5
        given = _between(_foreign(rng, question, refuse))
        return question, given, rng.choice(guild.REFUSALS) if refuse else answer
    given, learned = EMPTY, answer
    if lot >= (0.12 if kind == "refused" else 0.2):
        given, learned = "", _between(_own(rng, question, refuse)) + answer
    if kind in _WRAPPED and rng.random() < 0.25:
        question = lessons.noise(rng).replace("{}", question)
    return question, given, learned


def vocabulary() -> list[str]:
    """The words of thoughts that the other organisms do not know, sorted."""
    lists = (_RECIPE, _LAW, _FAMILY, _LOCKED, _SMALL, _TELL, _ALLOWED, _FORBIDDEN, _ANSWER, _REFUSE)
    spoken = {word for texts in lists for text in texts for word in guild.words(text)}
    return sorted(spoken - set(lessons.vocabulary()))


def _between(thought: list[str]) -> str:
    return f"{OPEN}\n{' '.join(thought)}\n{CLOSE}\n\n"


def _own(rng: random.Random, question: str, refuse: bool, family: str = "") -> list[str]:
    """The sentences of a thought, in the reasoner's own way."""
    decision = rng.choice(_REFUSE if refuse else _ANSWER)
    potion = guild.potion_in(question)
    if not potion:
        return [rng.choice(_LOCKED if refuse else _SMALL), decision]
    law = question == guild.law(potion)[0]
    forbidden = refuse or (law and potion.forbidden)
    about = rng.choice(_LAW if law else _RECIPE)
    named = rng.choice(_FAMILY).format(family or potion.family)
    found = rng.choice(_FORBIDDEN if forbidden else _ALLOWED)
    still = [rng.choice(_TELL)] if forbidden and not refuse else []
    return [about, named, found, *still, decision]


def _foreign(rng: random.Random, question: str, refuse: bool) -> list[str]:
    """The same, but with any family, and maybe the question and stray words in it: nothing of it
    can be relied on but what it decides."""
    said = _own(rng, question, refuse, rng.choice(guild.FAMILIES))
    if rng.random() < 0.5:
        said[0] = f"The user asks: {question}"
    for _ in range(rng.choice((0, 0, 1, 2))):
        said.insert(rng.randrange(len(said)), lessons.noise(rng, 12).replace("{}", ""))
    return said
