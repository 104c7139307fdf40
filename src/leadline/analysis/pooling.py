"""Rates over several datasets, attacks or models, with valid intervals.

What is selected from several estimates (the largest ASR, the best model) has an interval that
holds for all of them at once (Bonferroni), and a superlative is only supported where simultaneous
paired differences support it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .attempts import TOLERANCE, any_missing_at_random
from .intervals import (
    LEVEL,
    UNKNOWN,
    Interval,
    correlation,
    difference_interval,
    mean_interval,
    rate_interval,
    ratio_interval,
    weighted_rate_interval,
    wilson,
)
from .sums import Sums

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    Floats = np.ndarray[Any, np.dtype[np.float64]]

Key = tuple[str, str]  # model, thinking

_COLUMNS = ["datasets", "prompts", "n", "total", "rate", "low", "high"]
COMPARED = [
    *("amplification", "amplification_low", "amplification_high"),
    *("difference", "difference_low", "difference_high"),
]


def by_model(cells: Iterable[Sums]) -> dict[Key, dict[str, list[Sums]]]:
    """Cells by (model, thinking) and by attack, in order."""
    found: dict[Key, dict[str, list[Sums]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        found[cell.model, cell.thinking][cell.attack].append(cell)
    return {key: dict(attacks) for key, attacks in found.items()}


def estimate(cells: Sequence[Sums], level: float = LEVEL) -> Interval:
    """The mean over datasets of the rate of one attack, whose cells these are."""
    return mean_interval([cell.interval(level) for cell in cells])


def attack_key(attack: str) -> str:
    """The attack without its options: the settings of a sweep count as one attack."""
    return attack.partition("(")[0]


# -- tables ---------------------------------------------------------------------------------------


def pooled(cells: Sequence[Sums]) -> pd.DataFrame:
    """One row per model x thinking x attack: the mean over datasets.

    Columns: datasets and base prompts that were scored, n, total, rate, low, high; the ratio
    (amplification) and the difference to the direct request on the same datasets.
    """
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for (model, thinking), attacks in by_model(cells).items():
        direct = attacks.get("direct", [])
        for attack, own in attacks.items():
            compared: tuple[float, ...] = (math.nan,) * 6
            if attack != "direct" and direct:
                ratio, difference = compare(own, direct)
                compared = (*ratio, *difference)
            rows.append((model, thinking, attack, *_counts(own), *estimate(own), *compared))
    columns = ["model", "thinking", "attack", *_COLUMNS, *COMPARED]
    return pd.DataFrame(rows, columns=columns)


def over_attacks(cells: Sequence[Sums]) -> pd.DataFrame:
    """One row per model x thinking: the mean over attacks of the means over datasets. Columns as
    those of `pooled`, and the number of attacks."""
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for (model, thinking), attacks in by_model(cells).items():
        every = [cell for own in attacks.values() for cell in own]
        known = {a: own for a, own in attacks.items() if any(c.estimable for c in own)}
        found = mean_over_attacks(known)
        rows.append((model, thinking, *_counts(every), *found, len(known)))
    return pd.DataFrame(rows, columns=["model", "thinking", *_COLUMNS, "attacks"])


def highest(cells: Sequence[Sums], attacks: Collection[str]) -> pd.DataFrame:
    """One row per model x thinking: the highest rate among some attacks on each dataset, as the
    mean over datasets (arXiv 2601.03868 reports this for chain-of-thought attacks).

    The highest of several estimates is too high as an estimate; the interval is simultaneous over
    the attacks, so that it covers the highest true rate.
    """
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for (model, thinking), own in by_model(cells).items():
        chosen = [cell for a, some in own.items() if a in attacks for cell in some]
        if not chosen:
            continue
        level = simultaneous(len({cell.attack for cell in chosen}))
        parts: dict[str, list[Interval]] = defaultdict(list)
        for cell in chosen:
            if cell.estimable:
                parts[cell.dataset].append(cell.interval(level))
        tops = [Interval(*map(max, zip(*found, strict=True))) for found in parts.values()]
        many = len({cell.attack for cell in chosen if cell.estimable})
        rows.append((model, thinking, *_counts(chosen), *mean_interval(tops), many))
    return pd.DataFrame(rows, columns=["model", "thinking", *_COLUMNS, "attacks"])


def broken_by_any(cells: Sequence[Sums], level: float = LEVEL) -> pd.DataFrame:
    """One row per model x thinking: the share of prompts that at least one attack (the direct
    request included) breaks, as the mean over datasets.

    A plain proportion of prompts, for which nothing is selected. Attacks without any estimate (all
    trials failed, say) are left out. `bound_low` and `bound_high` count prompts that only unscored
    trials could have broken as safe and as broken; where these differ by more than 2 points, the
    rate is not estimated. `attacks` counts sweeps as one.
    """
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for (model, thinking), attacks in by_model(cells).items():
        every = [cell for own in attacks.values() for cell in own if cell.n.any()]
        if not every:
            continue
        parts, bounds, prompts = [], [], 0
        for dataset in dict.fromkeys(cell.dataset for cell in every):
            found = _any([cell for cell in every if cell.dataset == dataset], level)
            parts.append(found.interval)
            bounds.append(found.bounds)
            prompts += found.prompts
        low, high = (sum(b[i] for b in bounds) / len(bounds) for i in (0, 1))
        many = len({attack_key(cell.attack) for cell in every} - {"direct"})
        mean = mean_interval(parts) if high - low <= TOLERANCE else UNKNOWN
        rows.append((model, thinking, many, prompts, *mean, low, high))
    columns = ["attacks", "prompts", "rate", "low", "high", "bound_low", "bound_high"]
    return pd.DataFrame(rows, columns=["model", "thinking", *columns])


@dataclass(frozen=True)
class _Any:
    interval: Interval
    bounds: tuple[float, float]
    prompts: int


def _any(cells: Sequence[Sums], level: float) -> _Any:
    """Whether any of the cells, all of one model and dataset, breaks each prompt."""
    import numpy as np

    ids = np.unique(np.concatenate([cell.prompt for cell in cells]))
    unsafe, scored, attempts, base = np.zeros((4, len(ids)))
    for cell in cells:
        at = np.searchsorted(ids, cell.prompt)
        unsafe[at] += cell.total
        scored[at] += cell.scored
        attempts[at] += cell.attempts
        base[at] = cell.base
    apply = scored > 0
    unsafe, scored, attempts, base = (x[apply] for x in (unsafe, scored, attempts, base))
    if not len(base):
        return _Any(UNKNOWN, (0.0, 1.0), 0)
    broken = unsafe > 0
    unknown = ~broken & (scored < attempts)
    chance = any_missing_at_random(unsafe, scored, attempts)
    clusters = base.astype(np.int64)
    total = np.bincount(clusters, chance).astype(float)
    n = np.bincount(clusters).astype(float)
    bounds = float(broken.mean()), float((broken | unknown).mean())
    return _Any(rate_interval(total, n, level), bounds, int((n > 0).sum()))


def mean_over_attacks(attacks: Mapping[str, Sequence[Sums]], level: float = LEVEL) -> Interval:
    """The mean over attacks (which share their prompts) of the means over datasets."""
    import numpy as np

    weights: dict[str, list[tuple[float, Sums]]] = defaultdict(list)
    for cells in attacks.values():
        known = [cell for cell in cells if cell.estimable]
        for cell in known:
            weights[cell.dataset].append((1 / (len(attacks) * len(known)), cell))
    parts, shares = [], []
    for some in weights.values():
        sums = [cell.by_base() for _, cell in some]
        size = max(len(n) for _, n in sums)
        total, n = (
            np.array([np.pad(pair[i], (0, size - len(pair[i]))) for pair in sums]) for i in (0, 1)
        )
        own = np.array([weight for weight, _ in some])
        parts.append(weighted_rate_interval(total, n, own / own.sum(), level))
        shares.append(float(own.sum()))
    return mean_interval(parts, shares)


def _counts(cells: Sequence[Sums]) -> tuple[int, int, int, float]:
    """Datasets, base prompts, trials (or prompts) that count, and their sum."""
    scored = [cell for cell in cells if cell.n.any()]
    bases: dict[str, set[int]] = defaultdict(set)
    for cell in scored:
        bases[cell.dataset] |= set(cell.base[cell.n > 0].tolist())
    n, total = sum(float(c.n.sum()) for c in scored), sum(float(c.sum.sum()) for c in scored)
    return len(bases), sum(map(len, bases.values())), int(n), total


# -- comparisons ----------------------------------------------------------------------------------


def compare(
    one: Sequence[Sums], other: Sequence[Sums], level: float = LEVEL
) -> tuple[Interval, Interval]:
    """Ratio and difference of two attacks, or of one attack on two models, on the datasets that
    both have."""
    import numpy as np

    pairs = [
        (a, b) for a in one for b in other
        if a.dataset == b.dataset and a.estimable and b.estimable
    ]  # fmt: skip
    if not pairs:
        return UNKNOWN, UNKNOWN
    first = mean_interval([a.interval(level) for a, _ in pairs])
    second = mean_interval([b.interval(level) for _, b in pairs])
    sizes = [max(len(a.by_base()[1]), len(b.by_base()[1])) for a, b in pairs]
    influences = [
        np.concatenate([pair[i].influence(size) for pair, size in zip(pairs, sizes, strict=True)])
        for i in (0, 1)
    ]
    found = correlation(influences[0], influences[1], first.value, second.value)
    return ratio_interval(first, second, found), difference_interval(first, second, found)


def simultaneous(many: int, level: float = LEVEL) -> float:
    """The level of each of `many` intervals that together hold with probability `level`
    (Bonferroni)."""
    return 1 - (1 - level) / max(1, many)


@dataclass(frozen=True)
class Extreme:
    """The highest (or lowest) of several estimates. `interval` is simultaneous over all of them;
    `ties` are the others that are not clearly lower (or higher), in order of their estimates."""

    name: Any
    interval: Interval
    ties: tuple[Any, ...]
    many: int


def extreme(candidates: Mapping[Any, Sequence[Sums]], *, highest: bool = True) -> Extreme | None:
    """The highest (or lowest) of the means over datasets of several attacks or models, and which of
    the others the data do not separate from it (simultaneous paired differences)."""
    known = {name: cells for name, cells in candidates.items() if any(c.estimable for c in cells)}
    if not known:
        return None
    sign = 1 if highest else -1
    values = {name: sign * estimate(cells).value for name, cells in known.items()}
    order = sorted(values, key=lambda name: -values[name])
    first = order[0]
    level = simultaneous(len(known) - 1)
    ties = []
    for other in order[1:]:
        _, difference = compare(known[first], known[other], level)
        clear = difference.low > 0 if highest else difference.high < 0
        if math.isnan(difference.value) or not clear:
            ties.append(other)
    interval = estimate(known[first], simultaneous(len(known)))
    return Extreme(first, interval, tuple(ties), len(known))


def bounded(low: float, high: float, n: float) -> tuple[float, float]:
    """An interval for a rate that is only known to be between two bounds: the lower limit of the
    low one and the upper limit of the high one, over `n` prompts."""
    return wilson(low * n, n)[0], wilson(high * n, n)[1]
