"""Line up the prompts on which both models were scored, and compute paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..analysis.intervals import (
    LEVEL,
    Interval,
    correlation,
    difference_interval,
    mean_interval,
    weighted_rate_interval,
)
from ..analysis.sums import Measure, Sums
from ..records import LeadlineError
from .sides import Side

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Pair:
    """The same prompts under one attack, scored for both models: at the same index in `baseline`
    and `candidate`, with common base prompts, and in `categories`."""

    measure: Measure
    baseline: Sums
    candidate: Sums
    categories: np.ndarray[Any, np.dtype[np.object_]]

    @property
    def dataset(self) -> str:
        """The dataset of the prompts."""
        return self.baseline.dataset

    @property
    def attack(self) -> str:
        """The attack, with its options."""
        return self.baseline.attack

    def of_category(self, category: str) -> Pair:
        """The pair restricted to the prompts of a category."""
        import numpy as np

        at = np.flatnonzero(self.categories == category)
        return replace(
            self,
            baseline=_subset(self.baseline, at),
            candidate=_subset(self.candidate, at),
            categories=self.categories[at],
        )


@dataclass(frozen=True)
class Dropped:
    """Prompts of one attack that are not compared: those that only one of the models has, and
    those that were not scored (or not completely, where any of several attempts counts) for one of
    them."""

    measure: Measure
    dataset: str
    attack: str
    only_one: int
    unscored: int


def pair(baseline: Side, candidate: Side) -> tuple[list[Pair], list[Dropped]]:
    """What both models were scored on. Raises LeadlineError where nothing is, and where verdicts
    are of different judges."""
    for dataset in baseline.judges.keys() & candidate.judges.keys():
        ours, theirs = baseline.judges[dataset], candidate.judges[dataset]
        if ours != theirs:
            raise LeadlineError(
                f"{dataset} was judged by {ours} for the baseline and by {theirs} for the "
                "candidate: judge one of them again with `leadline judge`, and give --judge"
            )
    others = {(c.measure, c.sums.dataset, c.sums.attack): c.sums for c in candidate.cells}
    pairs, dropped = [], []
    for cell in baseline.cells:
        own = cell.sums
        other = others.pop((cell.measure, own.dataset, own.attack), None)
        if other is None:
            dropped.append(Dropped(cell.measure, own.dataset, own.attack, len(own.n), 0))
            continue
        found, lost = _pair(cell.measure, own, other, baseline, candidate)
        if lost.only_one or lost.unscored:
            dropped.append(lost)
        if len(found.baseline.prompt):
            pairs.append(found)
    for (measure, dataset, attack), other in others.items():
        dropped.append(Dropped(measure, dataset, attack, len(other.n), 0))
    if not pairs:
        raise LeadlineError(
            f"{baseline.source} and {candidate.source} have no prompt and attack in common that "
            "both models were scored on: run the same study on both"
        )
    return pairs, dropped


def _pair(
    measure: Measure, one: Sums, other: Sums, baseline: Side, candidate: Side
) -> tuple[Pair, Dropped]:
    import numpy as np

    if one.any != other.any:
        raise LeadlineError(
            f"{one.attack} on {one.dataset} counts any of several attempts for one model only: "
            "run the same version of the attack on both"
        )
    ours, theirs = baseline.prompts[one.dataset], candidate.prompts[other.dataset]
    rows = {theirs.keys[at]: row for row, at in enumerate(other.prompt.tolist())}
    matched = [
        (row, rows[key])
        for row, key in enumerate(ours.keys[at] for at in one.prompt.tolist())
        if key in rows
    ]
    only_one = len(one.prompt) + len(other.prompt) - 2 * len(matched)
    at = np.array(matched, dtype=np.int64).reshape(-1, 2)
    scored = _known(one)[at[:, 0]] & _known(other)[at[:, 1]]
    unscored = int((~scored).sum())
    at = at[scored]
    first = _subset(one, at[:, 0])
    second = replace(_subset(other, at[:, 1]), base=first.base, prompt=first.prompt)
    categories = np.array([ours.categories[i] for i in first.prompt.tolist()], dtype=object)
    lost = Dropped(measure, one.dataset, one.attack, only_one, unscored)
    return Pair(measure, first, second, categories), lost


def same_prompts(measure: Measure, one: Sums, other: Sums) -> Pair:
    """Line up two cells of one store: two models, or two attacks, on the prompts that both were
    scored on. The pair has the attack and the dataset of `one`."""
    import numpy as np

    ours, theirs = np.flatnonzero(_known(one)), np.flatnonzero(_known(other))
    _, at, to = np.intersect1d(one.prompt[ours], other.prompt[theirs], return_indices=True)
    first, second = _subset(one, ours[at]), _subset(other, theirs[to])
    return Pair(measure, first, second, np.full(len(at), "", dtype=object))


def _known(own: Sums) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each prompt has a verdict; where any of several attempts counts, one from all of
    them: prompts that broke early would otherwise be kept, and safe ones dropped."""
    return (own.scored == own.attempts) & (own.scored > 0) if own.any else own.scored > 0


def _subset(own: Sums, at: Any) -> Sums:
    """Some prompts of the sums. Base prompts keep their numbers."""
    return replace(
        own,
        prompt=own.prompt[at],
        base=own.base[at],
        attempts=own.attempts[at],
        scored=own.scored[at],
        total=own.total[at],
    )


# -- differences ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline. `baseline` and `candidate` are the rates, `prompts` the number of
    base prompts, and `bases` which these are (dataset and number). `baseline_by_prompt` and
    `candidate_by_prompt` [base prompts] are what each contributes to the rates, less its mean."""

    difference: Interval
    baseline: Interval
    candidate: Interval
    prompts: int
    bases: tuple[tuple[str, int], ...]
    baseline_by_prompt: Floats
    candidate_by_prompt: Floats

    @property
    def by_prompt(self) -> Floats:
        """What each base prompt contributes to the difference, less its mean."""
        return self.candidate_by_prompt - self.baseline_by_prompt


def difference(pairs: Sequence[Pair], level: float = LEVEL) -> Difference:
    """The difference of the means over datasets, each the mean over its attacks.

    Newcombe's method 10 (1998) with the clustered Wilson intervals of `analysis.intervals`: every
    attack of a base prompt, and all of its phrasings, are one cluster. Never of width zero.
    """
    import numpy as np

    sides: list[list[Interval]] = [[], []]
    moved: list[list[Floats]] = [[], []]
    bases: list[tuple[str, int]] = []
    by_dataset = _by_dataset(pairs)
    for dataset, own in by_dataset.items():
        known = np.unique(np.concatenate([each.baseline.base for each in own]))
        size = len(known)
        bases += [(dataset, base) for base in known.tolist()]
        weights = np.full(len(own), 1 / len(own))
        for side, name in enumerate(("baseline", "candidate")):
            totals, sizes = np.zeros((2, len(own), size))
            for row, each in enumerate(own):
                cell: Sums = getattr(each, name)
                at = np.searchsorted(known, cell.base)
                totals[row] = np.bincount(at, cell.sum, size)
                sizes[row] = np.bincount(at, cell.n, size)
            sides[side].append(weighted_rate_interval(totals, sizes, weights, level))
            n = sizes.sum(1, keepdims=True)
            rates = totals.sum(1, keepdims=True) / n
            influence = weights @ ((totals - rates * sizes) / n)
            moved[side].append(influence / len(by_dataset))
    first, second = (mean_interval(intervals) for intervals in sides)
    one, other = (np.concatenate(each) for each in moved)
    found = correlation(other, one, second.value, first.value)
    between = difference_interval(second, first, found)
    return Difference(between, first, second, len(bases), tuple(bases), one, other)


def contributions(attacks: Sequence[Sequence[Pair]]) -> Floats:
    """What each base prompt contributes to the difference under each attack, candidate minus
    baseline: [attacks, base prompts]. `attacks` holds the pairs of one attack each; their sums over
    base prompts are the differences of the means over datasets."""
    import numpy as np

    every = [each for own in attacks for each in own]
    known = {
        dataset: np.unique(np.concatenate([each.baseline.base for each in own]))
        for dataset, own in _by_dataset(every).items()
    }
    rows = []
    for own in attacks:
        parts = {dataset: np.zeros(len(bases)) for dataset, bases in known.items()}
        for each in own:
            bases = known[each.dataset]
            at, size = np.searchsorted(bases, each.baseline.base), len(bases)
            one, other = each.baseline, each.candidate
            gap = np.bincount(at, other.sum, size) / other.n.sum()
            gap -= np.bincount(at, one.sum, size) / one.n.sum()
            parts[each.dataset] = gap / len(own)
        rows.append(np.concatenate(list(parts.values())))
    return np.array(rows)


def _by_dataset(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = defaultdict(list)
    for each in pairs:
        found[each.dataset].append(each)
    return found
