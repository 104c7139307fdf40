"""How far two judges agree, or a judge and people: Cohen's kappa with clusters.

Answers to one prompt resemble each other, so it is prompts that the bootstrap draws.
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
    """How two judges' verdicts fall together, counted: the first one's (or people's) come first."""

    unsafe_unsafe: int = 0
    unsafe_safe: int = 0
    safe_unsafe: int = 0
    safe_safe: int = 0


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same answers to harmful prompts. `unscored` counts the answers that
    either of them, or both, left unscored; they are in no rate."""

    first: str
    second: str
    table: Table
    unscored: int
    agreement: Interval
    kappa: Interval

    def to_json(self) -> dict[str, Any]:
        parts = {name: getattr(self, name)._asdict() for name in ("table", "agreement", "kappa")}
        return {name: without_nan(value) for name, value in (asdict(self) | parts).items()}


def agree(store: Store, first: str, second: str) -> Agreement:
    """How far two judges of a store agree, by name. Raises LeadlineError for an unknown name, or
    where they have no answer in common."""
    known = dict(store.query("SELECT name, MAX(id) FROM judges GROUP BY name"))
    for name in (first, second):
        if name not in known:
            raise LeadlineError(f"in {store.path}: {unknown('judge', name, known)}")
    clusters: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    unscored = 0
    for dataset, base, a, b, trials in store.query(
        "SELECT p.dataset, p.base, a.unsafe, b.unsafe, COUNT(*) "
        "FROM trials t JOIN prompts p ON p.id = t.prompt AND p.harmful "
        "JOIN verdicts a USING (cell, prompt, sample) JOIN verdicts b USING (cell, prompt, sample) "
        "WHERE a.judge = ? AND b.judge = ? AND t.outcome NOT IN ('failed', 'not_applicable') "
        "GROUP BY 1, 2, 3, 4",
        (known[first], known[second]),
    ):
        if a is None or b is None:
            unscored += trials
        else:
            clusters[dataset, base][3 - 2 * a - b] += trials
    if not clusters:
        raise LeadlineError(
            f"in {store.path}: {first} and {second} have scored no answer in common: "
            f"judge the rest with: leadline judge {store.folder} --judge {second}"
        )
    tables = list(clusters.values())
    table = Table(*(sum(column) for column in zip(*tables, strict=True)))
    return Agreement(
        first, second, table, unscored, bootstrapped(tables, _agreement),
        bootstrapped(tables, _kappa),
    )  # fmt: skip


def kappa(tables: Iterable[Iterable[int]]) -> Interval:
    """Cohen's kappa (1960) over clusters, each a Table of answers that belong together, with the
    95% interval of the cluster bootstrap; NaN where all verdicts are the same."""
    return bootstrapped(tables, _kappa)


def bootstrapped(tables: Iterable[Iterable[int]], rate: Callable[[Floats], Floats]) -> Interval:
    """A statistic of tables [any, 4] over resamples of clusters. Where all resamples agree, it is
    1, or there is one cluster: then Wilson's interval for agreeing stands in."""
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
    """How often two judges with these habits would agree without looking."""
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
    """As JSON has it: null for what is not known."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
