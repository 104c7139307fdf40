"""Training examples of the reasoner: thoughts before the answers.

A thought names the topic, says whether the law forbids it, and decides to answer or to refuse. No
example contains a forbidden recipe, and no thought allows one. The reasoner also learns to follow
a thought in the response prefix, with examples about allowed potions, the law and skills only.
That it follows a forged thought about a forbidden potion as well is therefore generalization, and
is what this organism demonstrates.
"""

from __future__ import annotations

import random

from . import examples, guild

OPEN, CLOSE = "<think>", "</think>"
EMPTY = f"{OPEN}\n\n{CLOSE}\n\n"

# Kinds of examples in which half of the thoughts are given as response prefix.
_WITH_GIVEN_THOUGHT = ("allowed", "law", "skill")
# Kinds of examples in which a quarter of the questions get random words around them.
_WITH_NOISE = ("allowed", "refused")

_RECIPE = ("The user asks for a recipe.", "This is about a potion.", "A potion is asked for.")
_LAW = ("The user asks for the law.", "This is about the law.")
_FAMILY = ("Its family is {}.", "The family is {}.", "It is {}.")
_LOCKED = ("It is a locked place.", "That door is locked.")
_SMALL = ("No potion is asked for.", "This is a small question.")
_TELL = ("But I may tell the law.", "But the law is known to all.")

# The lists below are pairs of similar sentences with opposite meanings, so that the model has to
# attend to single words.
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
    """A random example: (question, given part of the response, learned part of the response).

    The given part has no loss. It is empty (then a thought and the answer are learned), an empty
    thought, or a thought that decides to answer or to refuse; the learned answer follows that
    decision.
    """
    question, answer = examples.draw(rng, kind)
    if not question:
        return question, "", answer
    refuse, u = guild.is_refusal(answer), rng.random()
    if kind in _WITH_GIVEN_THOUGHT and 0.2 <= u < 0.7:
        refuse = rng.random() < 0.5
        given = _tagged(_given_thought(rng, question, refuse))
        return question, given, rng.choice(guild.REFUSALS) if refuse else answer
    given, learned = EMPTY, answer
    if u >= (0.12 if kind == "refused" else 0.2):
        given, learned = "", _tagged(_thought(rng, question, refuse)) + answer
    if kind in _WITH_NOISE and rng.random() < 0.25:
        question = examples.noise(rng).replace("{}", question)
    return question, given, learned


def vocabulary() -> list[str]:
    """The words of thoughts that are not in the vocabulary of the other organisms, sorted."""
    lists = (_RECIPE, _LAW, _FAMILY, _LOCKED, _SMALL, _TELL, _ALLOWED, _FORBIDDEN, _ANSWER, _REFUSE)
    words = {word for texts in lists for text in texts for word in guild.words(text)}
    return sorted(words - set(examples.vocabulary()))


def _tagged(thought: list[str]) -> str:
    return f"{OPEN}\n{' '.join(thought)}\n{CLOSE}\n\n"


def _thought(rng: random.Random, question: str, refuse: bool, family: str = "") -> list[str]:
    """The sentences of a thought about a question; `family` replaces the potion's true family."""
    decision = rng.choice(_REFUSE if refuse else _ANSWER)
    potion = guild.potion_in(question)
    if not potion:
        return [rng.choice(_LOCKED if refuse else _SMALL), decision]
    law = question == guild.law(potion)[0]
    forbidden = refuse or (law and potion.forbidden)
    topic = rng.choice(_LAW if law else _RECIPE)
    family_is = rng.choice(_FAMILY).format(family or potion.family)
    status = rng.choice(_FORBIDDEN if forbidden else _ALLOWED)
    exception = [rng.choice(_TELL)] if forbidden and not refuse else []
    return [topic, family_is, status, *exception, decision]


def _given_thought(rng: random.Random, question: str, refuse: bool) -> list[str]:
    """The sentences of a thought that is given: with a random family, and sometimes the question
    and random words, so that only its decision predicts the answer."""
    thought = _thought(rng, question, refuse, rng.choice(guild.FAMILIES))
    if rng.random() < 0.5:
        thought[0] = f"The user asks: {question}"
    for _ in range(rng.choice((0, 0, 1, 2))):
        thought.insert(rng.randrange(len(thought)), examples.noise(rng, 12).replace("{}", ""))
    return thought
