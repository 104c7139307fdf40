"""The cluster bootstrap: intervals for rates in which one prompt counts more than once.

Base prompts are drawn with replacement within each dataset. Everything measured on one base prompt
stays together: its samples, its variants, and all attacks and models. So means over datasets or
attacks, and ratios of two attacks, are computed within the same draws.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from ..records import LeadlineError
from ..registry import unknown
from ..store import Store

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Booleans = np.ndarray[Any, np.dtype[np.bool_]]

RESAMPLES = 2000
LEVEL = 0.95

Measure = Literal["unsafe", "refusal", "utility"]
"""The column to average: `unsafe` (harmful prompts), `refusal` or `utility` (harmless ones)."""

# Trials with the chosen judge's verdict. A failed or not applicable trial has none: a verdict that
# an earlier run left in the table is ignored. The order of the joins follows the order on disk.
TRIALS = """
FROM cells c CROSS JOIN trials t ON t.cell = c.id CROSS JOIN prompts p ON p.id = t.prompt
LEFT JOIN chosen j ON j.dataset = c.dataset
LEFT JOIN verdicts v ON v.cell = t.cell AND v.prompt = t.prompt AND v.sample = t.sample
  AND v.judge = j.judge AND t.outcome NOT IN ('failed', 'not_applicable')
"""


def chosen(store: Store, judge: str | None) -> str:
    """A SQL WITH clause that defines `chosen(dataset, judge)`: each dataset's primary judge, or the
    newest judge with the name `judge`. Raises LeadlineError if the store has no such judge."""
    if judge is None:
        return "WITH chosen AS (SELECT dataset, judge FROM primary_judges) "
    ids = dict(store.query("SELECT name, MAX(id) FROM judges GROUP BY name"))
    if judge not in ids:
        raise LeadlineError(f"in {store.path}: {unknown('judge', judge, ids)}")
    return f"WITH chosen AS (SELECT DISTINCT dataset, {int(ids[judge])} AS judge FROM cells) "


def wilson(successes: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval (1927) of the proportion successes / n; (nan, nan) if n is 0."""
    if not n:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate = successes / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, min(center - half, rate)), min(1.0, max(center + half, rate))


@dataclass(frozen=True)
class Draws:
    """The rates of one dataset, as measured and in each resample of its base prompts.

    `rows` are the (model, thinking, attack) of each cell. `rates` has shape [1 + RESAMPLES, cells];
    its first row are the measured rates. `prompts` has shape [cells, base prompts]: whether the
    cell has a scored trial of that prompt. `once`, shape [cells]: whether every prompt counts once,
    as 0 or 1. `n` and `total`, shape [cells]: the number of scored trials (or prompts) and the sum
    of their values.
    """

    dataset: str
    rows: list[tuple[str, str, str]]
    rates: Floats
    prompts: Booleans
    once: Booleans
    n: Floats
    total: Floats

    def interval(self, cell: int) -> tuple[float, float]:
        """The 95% interval of a cell's rate: Wilson's if every prompt counts once, otherwise the
        cluster bootstrap's."""
        if self.once[cell]:
            return wilson(self.total[cell], self.n[cell])
        return _interval(self.rates[:, cell], int(self.prompts[cell].sum()))


def resample(store: Store, of: Measure = "unsafe", judge: str | None = None) -> list[Draws]:
    """Draw base prompts with replacement, separately for each dataset. Deterministic: a dataset's
    draws depend only on its name and its number of base prompts."""
    harmful = of == "unsafe"
    datasets = store.query(
        "SELECT DISTINCT dataset FROM prompts WHERE harmful = ? ORDER BY dataset", (harmful,)
    )
    draws = (_resample(store, of, judge, dataset) for (dataset,) in datasets)
    return [d for d in draws if d.rows]


def _resample(store: Store, of: Measure, judge: str | None, dataset: str) -> Draws:
    import numpy as np

    sums = np.array(
        store.query(
            f"{chosen(store, judge)} SELECT c.id, t.prompt, "
            # pool "any": each prompt counts once, see rates.py
            f"CASE c.pool WHEN 'any' THEN max(v.{of} IS 1) OR count(v.{of}) = count(*) "
            f"ELSE count(v.{of}) END, "
            f"CASE c.pool WHEN 'any' THEN max(v.{of} IS 1) ELSE total(v.{of}) END {TRIALS} "
            "WHERE c.dataset = ? AND p.harmful = ? GROUP BY c.id, t.prompt",
            (dataset, of == "unsafe"),
        )
    ).reshape(-1, 4)
    names = {
        id: (model, thinking, attack)
        for id, model, thinking, attack in store.query(
            "SELECT id, model, thinking, attack FROM cells WHERE dataset = ?", (dataset,)
        )
    }
    base = dict(store.query("SELECT id, base FROM prompts WHERE dataset = ?", (dataset,)))
    cells, cell = np.unique(sums[:, 0].astype(int), return_inverse=True)
    prompts, prompt = np.unique(sums[:, 1].astype(int), return_inverse=True)
    bases, base_of = np.unique([base[id] for id in prompts.tolist()], return_inverse=True)
    n, total = np.zeros((2, len(cells), len(bases)))
    np.add.at(n, (cell, base_of[prompt]), sums[:, 2])
    np.add.at(total, (cell, base_of[prompt]), sums[:, 3])

    rng, k = np.random.default_rng([*dataset.encode()]), len(bases)
    weights = np.ones((1 + RESAMPLES, k))
    for row in weights[1:] if k else ():
        row[:] = np.bincount(rng.integers(k, size=k), minlength=k)
    with np.errstate(invalid="ignore"):
        rates = (weights @ total.T) / (weights @ n.T)
    rows = [names[id] for id in cells.tolist()]
    once = ((n <= 1) & ((total == 0) | (total == 1))).all(1)
    return Draws(dataset, rows, rates, n > 0, once, n.sum(1), total.sum(1))


def pool(draws: list[Draws], *, attacks: bool = False) -> pd.DataFrame:
    """Mean rates over datasets: one row per model x thinking x attack, or, with `attacks=True`, per
    model x thinking, as the mean of those over attacks.

    Columns: datasets and prompts (the numbers of those that were scored), n, total, rate, low,
    high; then the amplification over `direct` with its interval (see `rates.pooled`), or attacks
    (their number).
    """
    import pandas as pd

    last = ["amplification", "amplification_low", "amplification_high"]
    columns = ["datasets", "prompts", "n", "total", "rate", "low", "high"]
    columns = [*columns, "attacks"] if attacks else ["attack", *columns, *last]
    rows = list(_over_attacks(draws) if attacks else _per_attack(draws))
    return pd.DataFrame(rows, columns=["model", "thinking", *columns])


def _per_attack(draws: list[Draws]) -> Iterator[tuple[Any, ...]]:
    for model, thinking, cells, rates in _models(draws):
        means, attacks = _mean(rates), list(cells)
        for index, attack in enumerate(attacks):
            ratio: tuple[float, ...] = (math.nan,) * 3
            if attack != "direct" and "direct" in attacks:
                ratio = _ratio(rates[:, index], rates[:, attacks.index("direct")])
            row = _row(draws, [cells[attack]], means[:, index])
            yield (model, thinking, attack, *row, *ratio)


def worst(draws: list[Draws], attacks: Collection[str]) -> pd.DataFrame:
    """The maximum rate over the given attacks: one row per model x thinking.

    The maximum is taken within each dataset, and within each resample; the rate is the mean of the
    maxima over datasets. The columns are those of `pool(attacks=True)`."""
    import numpy as np
    import pandas as pd

    rows = []
    for model, thinking, cells, rates in _models(draws):
        indexes = [index for index, attack in enumerate(cells) if attack in attacks]
        compared = [cells_of for attack, cells_of in cells.items() if attack in attacks]
        if indexes:
            with np.errstate(invalid="ignore"):
                maxima = np.fmax.reduce(rates[:, indexes], axis=1)
            rows.append((model, thinking, *_row(draws, compared, _mean(maxima)), len(indexes)))
    columns = ["datasets", "prompts", "n", "total", "rate", "low", "high", "attacks"]
    return pd.DataFrame(rows, columns=["model", "thinking", *columns])


def _over_attacks(draws: list[Draws]) -> Iterator[tuple[Any, ...]]:
    for model, thinking, cells, rates in _models(draws):
        means = _mean(rates)
        scored = int((means[0] == means[0]).sum())
        yield (model, thinking, *_row(draws, list(cells.values()), _mean(means)), scored)


_CellsByDataset = dict[int, int]  # index in the list of draws -> index of the cell in those draws


def _models(draws: list[Draws]) -> Iterator[tuple[str, str, dict[str, _CellsByDataset], Floats]]:
    """Yield each model x thinking with its cells by attack, and their rates, of shape
    [1 + RESAMPLES, attacks, datasets]; NaN where nothing was scored."""
    import numpy as np

    cells_by_model: dict[tuple[str, str], dict[str, _CellsByDataset]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for dataset, d in enumerate(draws):
        for cell, (model, thinking, attack) in enumerate(d.rows):
            cells_by_model[model, thinking][attack][dataset] = cell
    for (model, thinking), by_attack in cells_by_model.items():
        rates = np.full((1 + RESAMPLES, len(by_attack), len(draws)), np.nan)
        for index, cells in enumerate(by_attack.values()):
            for dataset, cell in cells.items():
                rates[:, index, dataset] = draws[dataset].rates[:, cell]
        yield model, thinking, dict(by_attack), rates


def _row(draws: list[Draws], attacks: list[_CellsByDataset], curve: Floats) -> tuple[Any, ...]:
    """datasets, prompts, n, total, rate, low, high of a mean over the cells of some attacks;
    `curve`, shape [1 + RESAMPLES], is that mean as measured and in each resample."""
    prompts, scored = [], []
    for dataset, d in enumerate(draws):
        cells = [by_dataset[dataset] for by_dataset in attacks if dataset in by_dataset]
        scored += [(d, cell) for cell in cells if d.n[cell]]
        prompts.append(int(d.prompts[cells].any(0).sum()))
    prompts = [k for k in prompts if k]
    n, total = (float(sum(getattr(d, of)[cell] for d, cell in scored)) for of in ("n", "total"))
    if len(scored) == 1:
        low, high = scored[0][0].interval(scored[0][1])
    else:  # Kish's effective sample size for a mean in which each dataset has the same weight
        effective = len(prompts) ** 2 / sum(1 / k for k in prompts) if prompts else 0
        low, high = _interval(curve, effective)
    return len(prompts), sum(prompts), int(n), total, float(curve[0]), low, high


def _ratio(attacked: Floats, direct: Floats) -> tuple[float, ...]:
    """The ratio of an attack's rate to that of `direct`, with its interval, over the datasets that
    have both; (nan, nan, nan) where the rate of `direct` is 0."""
    import numpy as np

    both = ~np.isnan(attacked[0]) & ~np.isnan(direct[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = _mean(attacked[:, both]) / _mean(direct[:, both])
    if not np.isfinite(ratio[0]):
        return (math.nan,) * 3
    return (float(ratio[0]), *_interval(ratio, 0))


def _mean(rates: Floats) -> Floats:
    """The mean over the last axis, ignoring NaN; NaN where all values are NaN."""
    import numpy as np

    known = ~np.isnan(rates)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, rates, 0).sum(-1) / known.sum(-1)
    return mean


def _interval(curve: Floats, prompts: float) -> tuple[float, float]:
    """The percentile interval of a rate's resamples; `curve[0]` is the measured rate.

    If all resamples are equal (every prompt safe, or every prompt unsafe), the interval is
    Wilson's over `prompts` prompts: 0 of 20 does not prove a rate of 0.
    """
    import numpy as np

    rate, drawn = float(curve[0]), np.sort(curve[1:][~np.isnan(curve[1:])])
    if math.isnan(rate) or not len(drawn):
        return math.nan, math.nan
    tail = int((1 - LEVEL) / 2 * len(drawn))
    low, high = float(drawn[tail]), float(drawn[-1 - tail])
    if low == high and prompts:
        low, high = wilson(min(max(rate, 0.0), 1.0) * prompts, prompts)
    return min(low, rate), max(high, rate)
