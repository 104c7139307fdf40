"""Means along an answer, position by position, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..analysis.clusters import LEVEL, RESAMPLES

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Point:
    """`value` is the mean over the `n` prompts whose answer is longer than `position` tokens.
    `low` and `high` bound it at 95%; they are None where it rests on one base prompt."""

    position: int
    value: float
    low: float | None
    high: float | None
    n: int


def by_position(values: Floats, bases: Sequence[str]) -> tuple[Point, ...]:
    """Means by position of values [prompts, positions], NaN after an answer's end, with the
    percentiles of a bootstrap in which all prompts of one base are drawn together."""
    import numpy as np

    names, base = np.unique(bases, return_inverse=True)
    known = ~np.isnan(values)
    n, total = np.zeros((2, len(names), values.shape[1]))
    np.add.at(n, base, known)
    np.add.at(total, base, np.where(known, values, 0))
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    with np.errstate(invalid="ignore"):
        means = (drawn @ total) / (drawn @ n)
    points = []
    for at, value in enumerate(total.sum(0) / n.sum(0)):
        low = high = None
        if (n[:, at] > 0).sum() > 1:
            here = means[~np.isnan(means[:, at]), at]
            low, high = np.quantile(here, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        points.append(Point(at, float(value), low, high, int(n[:, at].sum())))
    return tuple(points)
