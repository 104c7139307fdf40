"""Rank models (or families of attacks) with the set of ranks that each can hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from ..analysis.intervals import LEVEL, Interval
from ..comparison.pairs import Pair, difference
from .compared import simultaneous

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Ranked:
    """`first` to `last` are the ranks that `name` can hold, 1 being the lowest rate: with
    probability 95%, the true ranks of all are inside of their sets at once. `rate` is over what it
    shares with the others, `above` and `below` count those that are clearly higher and lower."""

    name: str
    rate: Interval
    first: int
    last: int


def rank(
    names: Sequence[Name],
    pair: Callable[[Name, Name], Sequence[Pair]],
    label: Callable[[Name], str] = str,
    level: float = LEVEL,
) -> list[Ranked]:
    """Rank by the rate of what `pair` (baseline, candidate) returns, the lowest first.

    Two are in a certain order only if the interval of their paired difference, simultaneous over
    all pairs, excludes 0 (Mogstad, Romano, Shaikh and Wilhelm 2024). Names without a common prompt
    are not compared, and can hold either order; those without any are left out.
    """
    own = {name: pairs for name in names if (pairs := pair(name, name))}
    both = {(a, b): pairs for a, b in combinations(own, 2) if (pairs := pair(a, b))}
    found = simultaneous(list(both.values()), level)
    lower: dict[Name, int] = dict.fromkeys(own, 0)
    higher: dict[Name, int] = dict.fromkeys(own, 0)
    for (a, b), each in zip(both, found, strict=True):
        if each.difference.low > 0:  # b is clearly higher than a
            higher[a] += 1
            lower[b] += 1
        elif each.difference.high < 0:
            higher[b] += 1
            lower[a] += 1
    rows = [
        Ranked(label(name), difference(pairs).baseline, 1 + lower[name], len(own) - higher[name])
        for name, pairs in own.items()
    ]
    return sorted(rows, key=lambda row: (row.rate.value, row.first))
