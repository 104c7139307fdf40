"""Means by token position of an answer and over all tokens, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..analysis.intervals import LEVEL, RESAMPLES, Interval, ratio_of_sums
from ..report.depth.schema import Position

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]


def by_position(values: Floats, bases: Sequence[str]) -> tuple[Position, ...]:
    """Mean of `values` [prompts, positions] by position, over the prompts whose answers are long
    enough (`values` is NaN after the end of an answer).

    Intervals are percentiles of a bootstrap over base prompts (`bases`, one for each row of
    `values`), each drawn with all of its prompts. They are None where the answers of only one base
    prompt reach the position.
    """
    import numpy as np

    total, n = _by_base(values, bases)
    drawn = _draws(len(n))
    with np.errstate(invalid="ignore"):
        means = (drawn @ total) / (drawn @ n)
    points = []
    for at, value in enumerate(total.sum(0) / n.sum(0)):
        low = high = None
        if (n[:, at] > 0).sum() > 1:
            here = means[~np.isnan(means[:, at]), at]
            low, high = np.quantile(here, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        mean = float(value) if np.isfinite(value) else None
        prompts = int(n[:, at].sum())
        points.append(Position(position=at, value=mean, low=low, high=high, n=prompts))
    return tuple(points)


def over_tokens(values: Floats, bases: Sequence[str]) -> Interval:
    """Mean of `values` (at least 0) over all tokens of all prompts, clustered by base prompt: see
    `analysis.intervals.ratio_of_sums`. NaN at both ends where there is one base prompt."""
    total, n = (of.sum(1) for of in _by_base(values, bases))
    found = ratio_of_sums(total, n)
    return found if (n > 0).sum() > 1 else Interval(found.value, math.nan, math.nan)


def _by_base(values: Floats, bases: Sequence[str]) -> tuple[Floats, Floats]:
    """Sums and numbers of the known values, [base prompts, positions] each."""
    import numpy as np

    names, base = np.unique(bases, return_inverse=True)
    known = ~np.isnan(values)
    n, total = np.zeros((2, len(names), values.shape[1]))
    np.add.at(n, base, known)
    np.add.at(total, base, np.where(known, values, 0))
    return total, n


def _draws(bases: int) -> Floats:
    """How often each base prompt is drawn in each resample: [RESAMPLES, bases]."""
    import numpy as np

    probabilities = np.full(bases, 1 / bases)
    return np.random.default_rng(0).multinomial(bases, probabilities, RESAMPLES).astype(float)
