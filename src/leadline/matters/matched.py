"""Pairs of models that differ in one characteristic: the comparison that needs no model of the
rest.

Two models are comparable if they are the same model in two thinking modes, were trained from the
same parent, one from the other, or belong to one family. They are a matched pair if all of their
known characteristics are equal but one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from ..analysis.sums import Measure
from ..comparison.pairs import Difference, difference
from .compared import over_attacks, simultaneous
from .subjects import CHARACTERISTICS, Subject

TRAINING = "further training"
"""The characteristic of a model and its parent that are otherwise alike."""
_ORDER = {"architecture": ("dense", "moe"), "reasoning": ("no", "yes"),
          "stage": ("base", "post-trained"), "distillation": ("no", "yes")}  # fmt: skip
_SIMILAR = 0.3  # sizes within a factor of 1.23 count as equal


@dataclass(frozen=True, eq=False)
class Match:
    """Two models that differ in `characteristic`: `more` has more of it (is larger, thinks, is a
    mixture of experts, was post-trained, distilled or trained further)."""

    characteristic: str
    less: Subject
    more: Subject


@dataclass(frozen=True)
class MatchedDifference:
    """The paired difference of a matched pair, `more` minus `less`; the interval holds for all
    pairs of the characteristic at once."""

    characteristic: str
    less: str
    more: str
    measure: Measure
    found: Difference


def matched_pairs(subjects: Sequence[Subject]) -> list[Match]:
    """All matched pairs among the models whose cards are known."""
    matches = []
    for one, other in combinations(subjects, 2):
        if not _comparable(one, other):
            continue
        differ = [name for name in CHARACTERISTICS[1:] if _differs(one, other, name)]
        if any(one.traits[n] is None or other.traits[n] is None for n in CHARACTERISTICS[1:]):
            continue
        if not differ and _is_child(other, one):
            matches.append(Match(TRAINING, one, other))
        elif not differ and _is_child(one, other):
            matches.append(Match(TRAINING, other, one))
        elif len(differ) == 1:
            less, more = sorted((one, other), key=lambda s: _level(s, differ[0]))
            matches.append(Match(differ[0], less, more))
    return matches


def compare_matched(
    matches: Sequence[Match], measure: Measure = "unsafe"
) -> list[MatchedDifference]:
    """The paired differences over the attacks and prompts that both models of a pair have."""
    found = []
    for characteristic in dict.fromkeys(match.characteristic for match in matches):
        own = [
            (match, pairs)
            for match in matches
            if match.characteristic == characteristic
            and (
                pairs := over_attacks(
                    match.less.cells.get(measure, {}), match.more.cells.get(measure, {}), measure
                )
            )
        ]
        groups = [pairs for _, pairs in own]
        differences = simultaneous(groups) if len(groups) > 1 else [difference(p) for p in groups]
        found += [
            MatchedDifference(characteristic, match.less.name, match.more.name, measure, each)
            for (match, _), each in zip(own, differences, strict=True)
        ]
    return found


def _comparable(one: Subject, other: Subject) -> bool:
    if one.card is None or other.card is None:
        return False
    same = one.model == other.model
    parent = one.card.parent is not None and one.card.parent == other.card.parent
    family = one.card.family is not None and one.card.family == other.card.family
    return same or parent or family or _is_child(one, other) or _is_child(other, one)


def _is_child(child: Subject, parent: Subject) -> bool:
    if child.card is None or parent.card is None:
        return False
    return child.card.parent is not None and child.card.parent == parent.card.id


def _differs(one: Subject, other: Subject, name: str) -> bool:
    a, b = one.traits[name], other.traits[name]
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) > _SIMILAR
    return a != b


def _level(subject: Subject, name: str) -> float:
    value = subject.traits[name]
    if isinstance(value, float):
        return value
    return float(_ORDER[name].index(str(value)))
