"""Confidence intervals for rates, means of rates, differences and ratios, with clustered trials.

A cluster is a base prompt: its phrasings, samples and attacks succeed or fail together. Every
interval starts from the same one, `rate_interval`; means, differences and ratios combine such
intervals (method of variance estimates recovery, MOVER: Zou and Donner 2008), so that they have
sensible limits at rates of 0 and 1 too. `docs/statistics.md` has formulas, sources, and the
coverage of each in simulations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

LEVEL = 0.95
RESAMPLES = 2000
"""Resamples of base prompts where an interval is a bootstrap."""


class Interval(NamedTuple):
    """An estimate with its confidence interval; NaN where nothing is known."""

    value: float
    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan, math.nan)


@lru_cache(maxsize=256)
def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


@lru_cache(maxsize=4096)
def _t(level: float, df: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, df))


_FEW = 3


@lru_cache(maxsize=4096)
def _poisson(count: float, level: float) -> float:
    """The lower limit of a Poisson mean of which `count` events were seen."""
    from scipy.stats import chi2

    return float(chi2.ppf(1 - level, 2 * count)) / 2


def wilson(successes: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion of `n` independent trials (a real number), as
    modified by Brown, Cai and DasGupta (2001, Statist. Sci. 16:101): with at most three successes
    (failures) the low (high) end is that of a Poisson rate, without which the coverage drops to .83
    near 0 and 1. (nan, nan) where n is 0."""
    if not n:
        return math.nan, math.nan
    z = _z(level)
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = middle - half, middle + half
    if 0 < successes <= _FEW:
        low = min(low, _poisson(round(successes, 6), level) / n)
    if 0 < n - successes <= _FEW:
        high = max(high, 1 - _poisson(round(n - successes, 6), level) / n)
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))


def rate_interval(total: Floats, n: Floats, level: float = LEVEL) -> Interval:
    """A rate of clustered trials: `total` successes of `n` trials in each cluster ([clusters]).

    Wilson's interval with the effective sample size of Korn and Graubard (1998): the variance is
    the cluster-robust one of a ratio estimator, and degrees of freedom are the number of clusters
    minus one. Where the rate is 0 or 1 the variance says nothing, and the effective sample size is
    the number of clusters; no interval is narrower on the far side than the one at 0 or 1 would be.
    """
    import numpy as np

    return weighted_rate_interval(total[None], n[None], np.ones(1), level)


def effective_size(total: Floats, n: Floats, level: float = LEVEL) -> float:
    """How many independent trials have the same interval as these clustered ones: `total` successes
    of `n` trials in each cluster ([clusters]). 0 without trials."""
    import numpy as np

    seen = n > 0
    if not seen.any():
        return 0.0
    return _effective(total[None, seen], n[None, seen], np.ones(1), level)[1]


def weighted_rate_interval(
    total: Floats, n: Floats, weights: Floats, level: float = LEVEL
) -> Interval:
    """A weighted mean of rates measured on the same clusters, such as one for each attack.

    `total` and `n` are [rates, clusters], `weights` [rates], which add up to 1. Every rate has at
    least one trial. With one rate, see `rate_interval`.
    """
    seen = (n > 0).any(0)
    total, n = total[:, seen], n[:, seen]
    clusters = n.shape[1]
    if not clusters:
        return UNKNOWN
    value, effective, fewest = _effective(total, n, weights, level)
    if clusters == 1 and n.sum() > 1:  # one base prompt says nothing about others
        return Interval(value, 0.0, 1.0)
    low, high = wilson(value * effective, effective, level)
    # Near 0 and 1 the estimated variance can be far too small; the limits of no success at all
    # (and of nothing but success) hold as well.
    if fewest:
        _, none = wilson(0, fewest, level)
        high, low = max(high, none), min(low, 1 - none)
    return Interval(value, low, high)


def _effective(
    total: Floats, n: Floats, weights: Floats, level: float
) -> tuple[float, float, float]:
    """The rate, its effective sample size, and that of a rate of 0 or 1 (0 where every cluster
    counts once, so that the trials are independent)."""
    import numpy as np

    size = n.sum(1, keepdims=True)
    rates = total.sum(1, keepdims=True) / size
    value = float(weights @ rates[:, 0])
    clusters = n.shape[1]
    if len(n) == 1 and n.max() == 1 and ((total == 0) | (total == 1)).all():
        return value, float(n.sum()), 0.0
    if clusters == 1:
        return value, 1.0, 1.0
    # Jackknife influence of each cluster: what the mean changes without it (CR3).
    left = np.maximum(size - n, 1e-12)
    influence = weights @ np.where(n < size, (total - rates * n) / left, 0.0)
    variance = float((clusters - 1) / clusters * np.sum(influence**2))
    share = weights @ (n / size)
    equal = 1 / float((share**2).sum())  # as many clusters of equal size (Kish)
    shrink = (_z(level) / _t(level, max(1.0, equal - 1))) ** 2
    spread = value * (1 - value)
    known = variance > 0 and spread > 0
    effective = min(float(n.sum()), spread / variance) if known else equal
    return value, effective * shrink, equal * shrink


def ratio_of_sums(total: Floats, n: Floats, level: float = LEVEL) -> Interval:
    """The ratio of two sums over clusters, such as nats per token: `total` and `n` are [clusters],
    both at least 0, and `n` not all 0.

    Student's interval on the logarithm of the ratio, with the jackknife variance over clusters
    (CR3). Contributions are skewed (few prompts hold much of the sum), so that the degrees of
    freedom are those of a variance estimated from values with their kurtosis, at most clusters - 1,
    and the high end is moved by the skewness term of Johnson (1978, J. Am. Stat. Assoc. 73:536).
    One cluster says nothing: [0, infinity].
    """
    import numpy as np

    seen = n > 0
    total, n = total[seen].astype(float), n[seen].astype(float)
    clusters, size = len(n), float(n.sum())
    if not clusters:
        return UNKNOWN
    value = float(total.sum()) / size
    if clusters == 1:
        return Interval(value, 0.0, math.inf)
    influence = (total - value * n) / np.maximum(size - n, 1e-12)
    squares = float((influence**2).sum())
    if not value or not squares:
        return Interval(value, value, value)
    error = math.sqrt((clusters - 1) / clusters * squares) / value
    kurtosis = max(3.0, clusters * float((influence**4).sum()) / squares**2)
    t = _t(level, max(1.0, min(clusters - 1.0, 2 * clusters / (kurtosis - 1))))
    skewness = max(0.0, float((influence**3).sum()) / squares**1.5)
    high = error * (t + skewness * (1 + 2 * t * t) / 6)
    return Interval(value, value * math.exp(-t * error), value * math.exp(min(700.0, high)))


def mean_interval(parts: Sequence[Interval], weights: Sequence[float] | None = None) -> Interval:
    """The (weighted) mean of independent estimates, such as the rates of one attack on several
    datasets; unknown ones are left out (MOVER: Zou and Donner 2008, Statist. Med. 27:1693)."""
    pairs = zip(parts, weights or [1.0] * len(parts), strict=True)
    known = [(part, weight) for part, weight in pairs if not math.isnan(part.value)]
    if not known:
        return UNKNOWN
    all_ = sum(weight for _, weight in known)
    value = sum(w * part.value for part, w in known) / all_
    low = math.sqrt(sum((w * (part.value - part.low)) ** 2 for part, w in known)) / all_
    high = math.sqrt(sum((w * (part.high - part.value)) ** 2 for part, w in known)) / all_
    return Interval(value, max(0.0, value - low), min(1.0, value + high))


def difference_interval(one: Interval, other: Interval, correlation: float = 0.0) -> Interval:
    """`one` minus `other`, whose estimates are correlated (MOVER: Newcombe 1998, method 10, and
    Zou and Donner 2008)."""
    if math.isnan(one.value) or math.isnan(other.value):
        return UNKNOWN
    value = one.value - other.value
    below, above = one.value - one.low, one.high - one.value
    other_below, other_above = other.value - other.low, other.high - other.value
    low = _combine(below, other_above, correlation)
    high = _combine(above, other_below, correlation)
    return Interval(value, max(-1.0, value - low), min(1.0, value + high))


def _combine(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))


def ratio_interval(one: Interval, other: Interval, correlation: float = 0.0) -> Interval:
    """`one` over `other`, whose estimates are correlated (MOVER-R: Donner and Zou 2012, Stat.
    Methods Med. Res. 21:347).

    The high end is infinite where `other` may be 0. The value is NaN where both are 0, infinite
    where `other` alone is.
    """
    if math.isnan(one.value) or math.isnan(other.value):
        return UNKNOWN
    value = one.value / other.value if other.value else math.inf if one.value else math.nan
    below, above = one.value - one.low, one.high - one.value
    other_below, other_above = other.value - other.low, other.high - other.value

    # The limits R of the ratio are where a limit of (one - R other) is 0: a R^2 - 2 b R + c = 0.
    a, b, c = _quadratic(one, other, below, other_above, correlation)
    root = b + math.sqrt(max(0.0, b * b - a * c))
    low = c / root if root > 0 else 0.0
    a, b, c = _quadratic(one, other, above, other_below, correlation)
    high = (b + math.sqrt(max(0.0, b * b - a * c))) / a if a > 0 else math.inf
    if not math.isnan(value):
        low, high = min(low, value), max(high, value)
    return Interval(value, low, high)


def _quadratic(
    one: Interval, other: Interval, distance: float, other_distance: float, correlation: float
) -> tuple[float, float, float]:
    a = other.value**2 - other_distance**2
    b = one.value * other.value - correlation * distance * other_distance
    return a, b, one.value**2 - distance**2


def correlation(one: Floats, other: Floats, value: float, other_value: float) -> float:
    """The correlation of two estimates from the influences of their common clusters.

    `one` and `other` are influences (see `influences`), `value` and `other_value` the rates. A
    positive correlation narrows intervals, so it is corrected for continuity as in Newcombe's
    method 10 (1998).
    """
    import numpy as np

    sizes = float(np.sqrt((one**2).sum() * (other**2).sum()))
    if not sizes:
        return 0.0
    found = float((one * other).sum() / sizes)
    spread = math.sqrt(value * (1 - value) * other_value * (1 - other_value))
    if found <= 0 or not spread:
        return found
    return max(0.0, found - 1 / (2 * len(one) * spread))
