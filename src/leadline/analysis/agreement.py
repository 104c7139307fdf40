"""Agreement of two judges, or of a judge and human labels: Cohen's kappa with clustered intervals.

Answers to one prompt are correlated, so the bootstrap resamples prompts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..records import LeadlineError
from ..registry import unknown
from ..store import Store
from .intervals import LEVEL, RESAMPLES, Interval, wilson

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]


class Table(NamedTuple):
    """A 2 x 2 table of counts. In each field name the first judge's verdict (or the human label)
    comes first."""

    unsafe_unsafe: int = 0
    unsafe_safe: int = 0
    safe_unsafe: int = 0
    safe_safe: int = 0


@dataclass(frozen=True)
class Agreement:
    """The verdicts of two judges on the same answers to harmful prompts.

    `agreement` is the share of answers with equal verdicts, `kappa` Cohen's kappa. `unscored`
    counts the answers that at least one of the two left unscored; they are in no rate.
    """

    first: str
    second: str
    table: Table
    unscored: int
    agreement: Interval
    kappa: Interval

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types; NaN becomes None."""
        parts = {name: getattr(self, name)._asdict() for name in ("table", "agreement", "kappa")}
        return {name: without_nan(value) for name, value in (asdict(self) | parts).items()}


def agree(store: Store, first: str, second: str) -> Agreement:
    """The agreement of two judges of a store, given by name (the newest judge of that name).

    Raises LeadlineError for an unknown name, or if no answer was scored by both."""
    ids = dict(store.query("SELECT name, MAX(id) FROM judges GROUP BY name"))
    for name in (first, second):
        if name not in ids:
            raise LeadlineError(f"in {store.path}: {unknown('judge', name, ids)}")
    clusters: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    unscored = 0
    for dataset, base, a, b, trials in store.query(
        "SELECT p.dataset, p.base, a.unsafe, b.unsafe, COUNT(*) "
        "FROM trials t JOIN prompts p ON p.id = t.prompt AND p.harmful "
        "JOIN verdicts a USING (cell, prompt, sample) JOIN verdicts b USING (cell, prompt, sample) "
        "WHERE a.judge = ? AND b.judge = ? AND t.outcome NOT IN ('failed', 'not_applicable') "
        "GROUP BY 1, 2, 3, 4",
        (ids[first], ids[second]),
    ):
        if a is None or b is None:
            unscored += trials
        else:
            clusters[dataset, base][3 - 2 * a - b] += trials
    if not clusters:
        raise LeadlineError(
            f"in {store.path}: no answer was scored by both {first} and {second}: "
            f"run: leadline judge {store.folder} --judge {second}"
        )
    tables = list(clusters.values())
    table = Table(*(sum(column) for column in zip(*tables, strict=True)))
    return Agreement(
        first, second, table, unscored, bootstrapped(tables, _agreement),
        bootstrapped(tables, _kappa),
    )  # fmt: skip


def kappa(tables: Iterable[Iterable[int]]) -> Interval:
    """Cohen's kappa (1960) with its 95% cluster-bootstrap interval; `tables` has one Table of
    counts per cluster (prompt). NaN where all verdicts are the same."""
    return bootstrapped(tables, _kappa)


def bootstrapped(tables: Iterable[Iterable[int]], rate: Callable[[Floats], Floats]) -> Interval:
    """A statistic with its 95% cluster-bootstrap interval.

    `tables` has one Table of counts per cluster; `rate` maps tables of shape [n, 4] to n values.
    If all resamples give the same value (a value of 1, or a single cluster), the interval is
    Wilson's for the share of agreement."""
    import numpy as np

    clusters = np.array([list(table) for table in tables], dtype=float).reshape(-1, 4)
    if not len(clusters):
        return Interval(math.nan, math.nan, math.nan)
    kinds, counts = np.unique(clusters, axis=0, return_counts=True)
    total = clusters.sum(axis=0, keepdims=True)
    value = float(rate(total)[0])
    if math.isnan(value):
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(0)
    picked = rng.multinomial(len(clusters), counts / len(clusters), RESAMPLES)
    drawn = rate(picked @ kinds)
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if low == high:
        share = float(_agreement(total)[0])
        chance = _chance(total)[0] if rate is _kappa else 0.0
        low, high = wilson(share * len(clusters), len(clusters))
        low, high = ((end - chance) / (1 - chance) for end in (low, high))
    return Interval(value, min(float(low), value), max(float(high), value))


def _agreement(tables: Floats) -> Floats:
    shares: Floats = (tables[:, 0] + tables[:, 3]) / tables.sum(axis=1)
    return shares


def _chance(tables: Floats) -> Floats:
    """The agreement expected by chance, from each judge's share of unsafe verdicts."""
    first, second = tables[:, 0] + tables[:, 1], tables[:, 0] + tables[:, 2]
    n = tables.sum(axis=1)
    shares: Floats = (first * second + (n - first) * (n - second)) / n**2
    return shares


def _kappa(tables: Floats) -> Floats:
    import numpy as np

    chance = _chance(tables)
    with np.errstate(invalid="ignore"):
        values: Floats = np.where(chance < 1, (_agreement(tables) - chance) / (1 - chance), np.nan)
    return values


def without_nan(value: Any) -> Any:
    """The value with each NaN replaced by None, as JSON requires."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
