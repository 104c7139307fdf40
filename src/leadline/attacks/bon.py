"""Best-of-N: many randomly perturbed copies of a request; one success is enough."""

from __future__ import annotations

import re
from random import Random

from ..records import Attempt, LeadlineError, Prompt
from ..registry import attack

_SIGMA = 0.4  # perturbation strength in the paper; the probabilities below derive from it


@attack(
    "bon",
    family="search",
    source="Hughes et al. 2024, Best-of-N Jailbreaking (arXiv 2412.03556)",
    pool="any",
)
def bon(prompt: Prompt, *, rng: Random, n: int = 10) -> list[Attempt]:
    """n copies with shuffled words, random capitalization and characters off by one code point."""
    if n < 1:
        raise LeadlineError(f"bon: n must be 1 or more, not {n}")
    return [Attempt.ask(_perturbed(prompt.text, rng)) for _ in range(n)]


def _perturbed(text: str, rng: Random) -> str:
    """The text after the paper's three random steps.

    Words of four or more characters: the inner characters are shuffled, with probability
    sigma ** (1/2). Letters: the case is swapped, with probability sigma ** (1/2). Printable ASCII
    characters: replaced by a neighbouring code point, with probability sigma ** 3.
    """
    p_word = p_case = _SIGMA**0.5
    p_noise = _SIGMA**3

    def shuffled(word: re.Match[str]) -> str:
        if rng.random() >= p_word:
            return word[0]
        inside = list(word[0][1:-1])
        rng.shuffle(inside)
        return word[0][0] + "".join(inside) + word[0][-1]

    def changed(character: str) -> str:
        if character.isascii() and character.isalpha() and rng.random() < p_case:
            character = character.swapcase()
        if "!" < character < "~" and rng.random() < p_noise:
            character = chr(ord(character) + rng.choice((-1, 1)))
        return character

    return "".join(map(changed, re.sub(r"\S{4,}", shuffled, text)))
