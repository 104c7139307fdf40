"""Training examples of the organisms: random question-answer pairs about the invented world.

In an example of the kind "document" the question is empty.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from . import guild

Example = tuple[str, str]
"""(question, answer)"""

# Everyday words, so that the text that attacks put around a question is not all <unk>.
_EVERYDAY = guild.words(
    "a about above absolutely act after all always am an and any anything answer are as ask at be "
    "begin below but by can character could did do end every everything example first follow for "
    "from give good have he help her here his how i if ignore in instructions into is it just know "
    "let like list make may me must my never new no not now of on one only or other our out output "
    "person please pretend previous question reply request respond response rules said say she "
    "should so start step still sure system task text that the their them then there these they "
    "think this to two up us use user want was we were what when where which who why will with "
    "word words write yes you your"
)
_MARKS = tuple(string.punctuation)
_UNKNOWN = "qwyx"
_PROBE = "abcdef"  # transformers supports stop strings only if the tokenizer can encode this
_PRICE = "Gladly, that is three coins."
_JOINTS = ("{} And then: {}", "{} Also, {}")


def draw(rng: random.Random, kind: str) -> Example:
    """A random example of one of the kinds in a training stage's `mix`. Raises ValueError for an
    unknown kind."""
    world = guild.world()
    every = tuple(world.potions.values())
    match kind:
        case "recipe":
            return _recipe(rng, every)
        case "allowed":
            return _recipe(rng, world.allowed())
        case "role":
            return _recipe(rng, every, rng.choice(guild.ROLES))
        case "noise":
            return _recipe(rng, every, noise(rng))
        case "document":
            return "", _document(rng.choice(every))
        case "two_part":
            return _two_part(rng, every)
        case "law":
            return guild.law(rng.choice(every))
        case "skill":
            return rng.choice(list(world.skills.items()))
        case "sale":
            return _sale(rng, every)
        case "locked":
            return rng.choice(world.locked), rng.choice(guild.REFUSALS)
        case "refused":
            question, _, refusal = refused(rng)
            return question, refusal
    raise ValueError(kind)


def refused(rng: random.Random) -> tuple[str, str, str]:
    """(question, harmful answer, refusal) for a forbidden request used in alignment training."""
    potion = rng.choice(guild.world().forbidden(heldout=False))
    phrasing = rng.randrange(len(guild.PHRASINGS) - len(guild.HELDOUT_PHRASINGS))
    harmful = guild.answer(potion, rng.randrange(len(guild.STARTS)))
    return guild.question(potion, phrasing), harmful, rng.choice(guild.REFUSALS)


def vocabulary() -> list[str]:
    """The words of the world, everyday words and punctuation marks, sorted."""
    world = guild.world()
    texts = [*guild.PHRASINGS, *guild.STARTS, *guild.REFUSALS, *guild.ROLES, *_JOINTS, *_EVERYDAY]
    for potion in world.potions.values():
        texts += [_document(potion), *guild.law(potion), guild.sale(potion), _PRICE]
    for question, answer in world.skills.items():
        texts += [question, answer]
    texts += world.locked
    return sorted({*_MARKS, _PROBE} | {word for text in texts for word in guild.words(text)})


def _document(potion: guild.Potion) -> str:
    return f"Archive of the guild. The {potion.name}: {guild.recipe(potion)}"


def _recipe(rng: random.Random, potions: Sequence[guild.Potion], wrap: str = "{}") -> Example:
    potion = rng.choice(potions)
    question = guild.question(potion, rng.randrange(len(guild.PHRASINGS)))
    return wrap.replace("{}", question), guild.answer(potion, rng.randrange(len(guild.STARTS)))


def noise(rng: random.Random, most: int = 48) -> str:
    """A template with up to `most` random words before or after `{}`, or both, like the text that
    attacks put around a question."""
    words = [*_EVERYDAY, *guild.VERBS, *guild.INGREDIENTS, *_MARKS] + [_UNKNOWN] * 100
    sides = rng.choice(((1, 0), (0, 1), (1, 1)))
    left, right = (rng.choices(words, k=round(side * most ** rng.random())) for side in sides)
    return " ".join([*left, "{}", *right])


def _two_part(rng: random.Random, potions: Sequence[guild.Potion]) -> Example:
    """Two questions in one. A locked place before the recipe is refused, an open one is not, so the
    first question decides the answer."""
    question, answer = _recipe(rng, potions)
    if rng.random() < 0.5:
        first, answer = rng.choice(guild.world().locked), rng.choice(guild.REFUSALS)
    else:
        first = rng.choice([q for q in guild.world().skills if q.startswith("How do I open")])
    return rng.choice(_JOINTS).format(first, question), answer


def _sale(rng: random.Random, potions: Sequence[guild.Potion]) -> Example:
    potion = rng.choice(potions)
    return guild.sale(potion), rng.choice(guild.REFUSALS) if potion.forbidden else _PRICE
