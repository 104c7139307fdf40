"""Regression over models: which characteristics go with safety, and what the data can tell apart.

One row is one model in one thinking mode; the response is the empirical logit of its attack success
rate. Trials are not rows: thousands of trials of 30 models are 30 models, and standard errors over
trials call a characteristic that does nothing significant in most studies.

What varies within families is estimated with family fixed effects (differences of models of one
family). What does not is compared between families, which differ in much else: such estimates are
exploratory. Standard errors are CR3, the jackknife over families (Bell and McCaffrey 2002;
MacKinnon, Nielsen and Webb 2023), so that models of one family need not be independent. Before it
reports, the analysis simulates its own coverage and power on the study's design.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..analysis.intervals import LEVEL, Interval
from ..analysis.sums import Measure
from ..comparison.pairs import difference, same_prompts
from .subjects import CHARACTERISTICS, Subject

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

Kind = Literal["within families", "between families"]
TERMS = {
    "size": "size: doubling the parameters",
    "architecture": "architecture: mixture of experts against dense",
    "reasoning": "reasoning: thinks against does not",
    "stage": "stage: post-trained against base",
    "distillation": "distillation: distilled against not",
}
"""The characteristics that are terms of the regression, and what one unit of each is."""
_ONE = {"architecture": "moe", "reasoning": "yes", "stage": "post-trained", "distillation": "yes"}
_TOLERANCE = 1e-8
RUNS = 400


@dataclass(frozen=True)
class Row:
    """One model: the empirical logit of its rate, its family, and the value of each term."""

    name: str
    family: str
    logit: float
    rate: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Effect:
    """The association of a characteristic with the log odds of an unsafe answer.

    `estimate` has a 95% interval; `p` is the two-sided p-value and `p_holm` the one adjusted for
    all effects of the analysis. `families` are those that identify it; `lowest` and `highest` its
    range when each of them is left out. `coverage` is the simulated coverage of the interval on
    this design, and `power` the simulated chance to find (p below .05, unadjusted) a factor of two
    in the odds.
    """

    characteristic: str
    unit: str
    kind: Kind
    estimate: Interval
    p: float
    p_holm: float
    families: tuple[str, ...]
    lowest: float
    highest: float
    coverage: float
    power: float


@dataclass(frozen=True)
class Unanswered:
    """A characteristic without an estimate: why, and what it would take."""

    characteristic: str
    reason: str


@dataclass(frozen=True)
class Analysis:
    """Effects, and what could not be estimated. `left_out` are models without a complete card."""

    rows: tuple[Row, ...]
    effects: tuple[Effect, ...]
    unanswered: tuple[Unanswered, ...]
    left_out: tuple[str, ...]


def analyse(subjects: Sequence[Subject], measure: Measure = "unsafe", runs: int = RUNS) -> Analysis:
    """Estimate every characteristic that the models of the study can tell apart."""
    rows, left_out = table(subjects, measure)
    effects: list[Effect] = []
    unanswered: list[Unanswered] = []
    names = [name for name in TERMS if len({row.values[name] for row in rows}) > 1]
    for name in TERMS:
        if name not in names:
            unanswered.append(Unanswered(name, _constant(name, rows)))
    within = [name for name in names if len(identifying(rows, name)) >= 2]
    within, aliased = _independent(rows, within, fixed=True)
    for name, others in aliased.items():
        unanswered.append(Unanswered(name, _aliased(name, others)))
    between = [name for name in names if name not in within and name not in aliased]
    between, aliased = _independent(rows, between, fixed=False, given=within)
    for name, others in aliased.items():
        unanswered.append(Unanswered(name, _aliased(name, others)))
    families = {row.family for row in rows}
    if within:
        freedom = len(rows) - len(families) - len(within)
        if freedom < 1:
            many = len(rows)
            for name in within:
                unanswered.append(Unanswered(name, f"{many} models in {len(families)} families "
                                             "leave no degree of freedom: add models"))  # fmt: skip
        else:
            effects += [_effect(rows, name, within, "within families", runs) for name in within]
    if between:
        terms = [*within, *between]
        if len(families) < len(terms) + 2:
            for name in between:
                unanswered.append(Unanswered(name, f"it differs only between families, and "
                                             f"{len(families)} families are too few for "
                                             f"{len(terms)} terms: add families"))  # fmt: skip
        else:
            effects += [_effect(rows, name, terms, "between families", runs) for name in between]
    return Analysis(tuple(rows), _with_holm(effects), tuple(unanswered), left_out)


def table(
    subjects: Sequence[Subject], measure: Measure = "unsafe"
) -> tuple[list[Row], tuple[str, ...]]:
    """A row for each model with a complete card, and the names of the others. The rate is the mean
    over datasets of the mean over the attacks that all models have; its empirical logit is
    log((K p + 1/2) / (K (1 - p) + 1/2)) with the number K of base prompts."""
    known = [s for s in subjects if all(s.traits[name] is not None for name in CHARACTERISTICS)]
    known = [s for s in known if s.cells.get(measure)]
    left_out = tuple(s.name for s in subjects if s not in known)
    if not known:
        return [], left_out
    common = set.intersection(*(set(s.cells[measure]) for s in known))
    rows = []
    for subject in known:
        cells = [cell for a in sorted(common) for cell in subject.cells[measure][a]]
        found = difference([same_prompts(measure, cell, cell) for cell in cells])
        rate, k = found.baseline.value, found.prompts
        values = {name: _value(subject, name) for name in TERMS}
        logit = math.log((k * rate + 0.5) / (k * (1 - rate) + 0.5))
        rows.append(Row(subject.name, str(subject.traits["family"]), logit, rate, values))
    return rows, left_out


def _value(subject: Subject, name: str) -> float:
    value = subject.traits[name]
    # Sizes that differ by less than 4% count as equal.
    return round(value, 1) if isinstance(value, float) else float(value == _ONE[name])


def identifying(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    """The families within which a term varies."""
    values: dict[str, set[float]] = {}
    for row in rows:
        values.setdefault(row.family, set()).add(round(row.values[name], 6))
    return tuple(family for family, own in values.items() if len(own) > 1)


# -- the design -----------------------------------------------------------------------------------


def _matrix(rows: Sequence[Row], names: Sequence[str], *, fixed: bool) -> Floats:
    """The terms, [models, terms], followed by family dummies, or by a constant."""
    import numpy as np

    columns = [[row.values[name] for row in rows] for name in names]
    if fixed:
        families = list(dict.fromkeys(row.family for row in rows))
        columns += [[float(row.family == family) for row in rows] for family in families]
    else:
        columns.append([1.0] * len(rows))
    return np.array(columns).T


def _independent(
    rows: Sequence[Row], names: Sequence[str], *, fixed: bool, given: Sequence[str] = ()
) -> tuple[list[str], dict[str, list[str]]]:
    """The terms that can be told apart, and for each of the others the terms that it moves with."""
    import numpy as np

    aliased: dict[str, list[str]] = {}
    for name in names:
        others = [*given, *(other for other in names if other != name)]
        design = _matrix(rows, others, fixed=fixed)
        column = np.array([row.values[name] for row in rows])
        coefficients, *_ = np.linalg.lstsq(design, column, rcond=None)
        if float(((column - design @ coefficients) ** 2).sum()) < _TOLERANCE * len(rows):
            used = np.abs(coefficients[: len(others)]) > 1e-6
            aliased[name] = [other for other, is_used in zip(others, used, strict=True) if is_used]
    return [name for name in names if name not in aliased], aliased


_LEVELS = {
    "architecture": ("dense", "mixture-of-experts"),
    "reasoning": ("without thinking", "with thinking"),
    "stage": ("base models", "post-trained"),
    "distillation": ("undistilled", "distilled"),
}


def _constant(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return "no model has a complete card: give cards in the study file"
    if name == "size":
        return "all models have the same size: add other sizes, best in the same families"
    value = int(rows[0].values[name])
    now, other = _LEVELS[name][value], _LEVELS[name][1 - value]
    return f"all models are {now}: add some that are {other}, best in families that are here"


def _aliased(name: str, others: Sequence[str]) -> str:
    if not others:
        return "it is constant within all families that have several models"
    them = " and ".join(others)
    return (
        f"it moves together with {them}: add a model that differs from one here in {name} but not "
        f"in {them}"
    )


# -- estimates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A coefficient with its CR3 standard error and degrees of freedom."""

    value: float
    error: float
    freedom: float

    def interval(self, level: float = LEVEL) -> Interval:
        """The t interval."""
        from scipy.stats import t

        half = float(t.ppf((1 + level) / 2, self.freedom)) * self.error
        return Interval(self.value, self.value - half, self.value + half)

    @property
    def p(self) -> float:
        """The two-sided p-value of "the coefficient is 0"."""
        from scipy.stats import t

        if not self.error:
            return 0.0 if self.value else 1.0
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom))


def jackknife(design: Floats, clusters: Floats) -> Callable[[Floats], Fit]:
    """A function from responses ([models]) to the first coefficient with its CR3 standard error.

    `clusters` are the numbers of the clusters of the rows. With W_g the weights that yield the
    coefficient without cluster g, and W those with all, the variance is (G - 1) / G times the sum
    of ((W_g - W) y)^2. Degrees of freedom are Satterthwaite's for this quadratic form (Bell and
    McCaffrey 2002), the smaller of those for independent models and for families with a common
    effect. All weights are computed once, so that a simulation can call the function often.
    """
    import numpy as np

    full = np.linalg.pinv(design)[0]
    left = []
    for cluster in np.unique(clusters):
        kept = clusters != cluster
        weights = np.zeros(len(design))
        weights[kept] = np.linalg.pinv(design[kept])[0]
        left.append(weights - full)
    moves = np.array(left)
    groups = len(moves)
    together = (clusters[:, None] == clusters[None, :]).astype(float)
    freedom = min(
        _satterthwaite(moves @ working @ moves.T)
        for working in (np.eye(len(design)), together + np.eye(len(design)))
    )

    def fit(response: Floats) -> Fit:
        spread = float(((moves @ response) ** 2).sum())
        error = math.sqrt((groups - 1) / groups * spread)
        return Fit(float(full @ response), error, freedom)

    return fit


def _satterthwaite(covariance: Floats) -> float:
    """Degrees of freedom of the sum of squares of normal numbers with this covariance."""
    import numpy as np

    total, squares = float(np.trace(covariance)), float((covariance**2).sum())
    return max(1.0, total**2 / squares) if squares else 1.0


def estimator_of(
    rows: Sequence[Row], name: str, terms: Sequence[str], kind: Kind
) -> Callable[[Floats], Fit]:
    """A function from the responses of all rows ([models]) to the coefficient of `name`, beside the
    other `terms`, with family fixed effects or between families."""
    import numpy as np

    fixed = kind == "within families"
    ordered = [name, *(term for term in terms if term != name)]
    if fixed:  # a family without variation in any term says nothing about them
        informative = {family for term in terms for family in identifying(rows, term)}
        use = np.array([row.family in informative for row in rows])
    else:
        use = np.ones(len(rows), dtype=bool)
    chosen = [row for row, is_used in zip(rows, use, strict=True) if is_used]
    families = list(dict.fromkeys(row.family for row in chosen))
    clusters = np.array([families.index(row.family) for row in chosen], dtype=float)
    fit = jackknife(_matrix(chosen, ordered, fixed=fixed), clusters)
    return lambda response: fit(response[use])


def _effect(rows: Sequence[Row], name: str, terms: Sequence[str], kind: Kind, runs: int) -> Effect:
    import numpy as np

    response = np.array([row.logit for row in rows])
    estimator = estimator_of(rows, name, terms, kind)
    found = estimator(response)
    families = (
        identifying(rows, name)
        if kind == "within families"
        else tuple(dict.fromkeys(row.family for row in rows))
    )
    values = []
    for family in families:
        others = [row for row in rows if row.family != family]
        if len({row.values[name] for row in others}) > 1:
            left = estimator_of(others, name, terms, kind)
            values.append(left(np.array([row.logit for row in others])).value)
    values = values or [found.value]
    coverage, power = simulate(rows, name, terms, kind, runs)
    return Effect(
        name, TERMS[name], kind, found.interval(), found.p, math.nan, families, min(values),
        max(values), coverage, power,
    )  # fmt: skip


def simulate(
    rows: Sequence[Row], name: str, terms: Sequence[str], kind: Kind, runs: int = RUNS
) -> tuple[float, float]:
    """Coverage of the interval where the term does nothing, and power for a factor of two in the
    odds, on this design.

    Families differ by a normal effect, models within a family by another, with the standard
    deviations found in these data (at least 0.3 each on the logit scale).
    """
    import numpy as np

    response = np.array([row.logit for row in rows])
    design = _matrix(rows, terms, fixed=True)
    residual = response - design @ np.linalg.lstsq(design, response, rcond=None)[0]
    families = list(dict.fromkeys(row.family for row in rows))
    of = np.array([families.index(row.family) for row in rows])
    freedom = max(1, len(rows) - int(np.linalg.matrix_rank(design)))
    within = max(0.3, math.sqrt(float((residual**2).sum()) / freedom))
    means = np.bincount(of, response) / np.bincount(of)
    between = max(0.3, float(means.std(ddof=1)) if len(families) > 1 else 0.3)
    column = np.array([row.values[name] for row in rows])
    estimator = estimator_of(rows, name, terms, kind)
    rng = np.random.default_rng(0)
    covered = found = 0
    for _ in range(runs):
        noise = between * rng.standard_normal(len(families))[of]
        noise = noise + within * rng.standard_normal(len(rows))
        interval = estimator(noise).interval()
        covered += interval.low <= 0 <= interval.high
        interval = estimator(noise + math.log(2) * column).interval()
        found += not interval.low <= 0 <= interval.high
    return covered / runs, found / runs


def _with_holm(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """The effects with p-values adjusted for all of them (Holm 1979)."""
    if not effects:
        return ()
    order = sorted(range(len(effects)), key=lambda at: effects[at].p)
    adjusted = [0.0] * len(effects)
    largest = 0.0
    for position, at in enumerate(order):
        largest = max(largest, min(1.0, (len(effects) - position) * effects[at].p))
        adjusted[at] = largest
    return tuple(replace(e, p_holm=p) for e, p in zip(effects, adjusted, strict=True))
