"""Paired differences between what models (or attacks) of one study did on the same prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from ..analysis.intervals import LEVEL
from ..analysis.sums import Measure, Sums
from ..comparison.pairs import Difference, Pair, difference, same_prompts

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

DRAWS = 2000


def over_attacks(
    one: Mapping[str, Sequence[Sums]], other: Mapping[str, Sequence[Sums]], measure: Measure
) -> list[Pair]:
    """The prompts that two models were scored on under the same attacks: `one` as the baseline,
    `other` as the candidate."""
    return _pairs(measure, [(one[attack], other[attack]) for attack in one if attack in other])


def over_models(
    cells: Sequence[tuple[Sequence[Sums], Sequence[Sums]]], measure: Measure = "unsafe"
) -> list[Pair]:
    """The prompts that both of two attacks were tried on, for each of several models."""
    return _pairs(measure, cells)


def _pairs(measure: Measure, cells: Sequence[tuple[Sequence[Sums], Sequence[Sums]]]) -> list[Pair]:
    pairs = []
    for ours, theirs in cells:
        by_dataset = {cell.dataset: cell for cell in theirs}
        for cell in ours:
            if cell.dataset in by_dataset:
                pair = same_prompts(measure, cell, by_dataset[cell.dataset])
                if len(pair.baseline.prompt):
                    pairs.append(pair)
    return pairs


def simultaneous_level(differences: Sequence[Difference], level: float = LEVEL) -> float:
    """The level of each of several differences at which all of their intervals hold together with
    probability `level`.

    The critical value is the quantile of the largest of the standardized differences when the
    contributions of each base prompt, to all of them at once, are multiplied by the same standard
    normal number (multiplier bootstrap: Chernozhukov, Chetverikov and Kato 2013); at most that of
    Bonferroni.
    """
    import numpy as np

    many = len(differences)
    bonferroni = 1 - (1 - level) / max(1, many)
    columns: dict[tuple[str, int], int] = defaultdict(lambda: len(columns))
    rows = [
        ([columns[base] for base in each.bases], each.by_prompt)
        for each in differences
        if (each.by_prompt**2).sum() > 0
    ]
    if len(rows) < 2:
        return bonferroni
    moved = np.zeros((len(rows), len(columns)))
    for row, (at, values) in enumerate(rows):
        moved[row, at] = values / np.sqrt((values**2).sum())
    rng = np.random.default_rng(0)
    top = np.concatenate([
        np.abs(rng.standard_normal((250, moved.shape[1])) @ moved.T).max(1)
        for _ in range(DRAWS // 250)
    ])  # fmt: skip
    critical = float(np.quantile(top, level))
    return min(bonferroni, 2 * NormalDist().cdf(critical) - 1)


def simultaneous(every: Sequence[Sequence[Pair]], level: float = LEVEL) -> list[Difference]:
    """The difference of each group of pairs, with intervals that hold for all groups at once."""
    first = [difference(pairs) for pairs in every]
    each = simultaneous_level(first, level)
    return [difference(pairs, each) for pairs in every]
