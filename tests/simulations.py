"""Coverage of the intervals in simulations with known truth.

    python -m tests.simulations [--runs 1000]      # the table of docs/statistics.md

Each setting draws data from a known truth, computes an interval through the function that users
call, and counts how often it covers. `before` is the coverage of the intervals that Leadline had
until November 2026 in the same setting, where it was measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from leadline.analysis import pooling
from leadline.analysis.attempts import any_bounds
from leadline.analysis.intervals import (
    correlation,
    difference_interval,
    effective_size,
    mean_interval,
    rate_interval,
    ratio_interval,
    ratio_of_sums,
)
from leadline.analysis.judge_error import corrected
from leadline.analysis.sums import Sums
from leadline.comparison.gate import decide, max_t
from leadline.comparison.pairs import Pair, difference
from leadline.comparison.power import draw
from leadline.depth.d50 import d50
from leadline.matters.compared import over_models
from leadline.matters.external import any_of as any_of_k
from leadline.matters.factors import Row as ModelRow
from leadline.matters.factors import estimator_of
from leadline.matters.ranking import rank

LOWEST = 0.93
"""The lowest coverage that a setting may have: .95 less three Monte Carlo standard errors at 1,000
runs."""

Run = Callable[[np.random.Generator], bool]


@dataclass(frozen=True)
class Setting:
    """`run` draws data and says whether the interval covers; slow settings have `most` runs."""

    name: str
    run: Run
    before: float | None = None
    most: int | None = None


def clustered(rng: Any, rate: float, sizes: Any, rho: float) -> Any:
    """Successes in clusters of these sizes, with an intra-cluster correlation of rho."""
    if not rho:
        return rng.binomial(sizes, rate).astype(float)
    a, b = rate * (1 - rho) / rho, (1 - rate) * (1 - rho) / rho
    return rng.binomial(sizes, rng.beta(a, b, len(sizes))).astype(float)


def cell(total: Any, n: Any = None, attack: str = "direct", model: str = "m") -> Sums:
    """A cell with one prompt for each base prompt."""
    total = np.asarray(total, dtype=float)
    n = np.ones(len(total)) if n is None else np.asarray(n, dtype=float)
    at = np.arange(len(total))
    return Sums(model, "", "d", attack, False, at, at, n, n, total)


# -- rates ----------------------------------------------------------------------------------------


def rate(clusters: int, sizes: str, rho: float, truth: float) -> Run:
    """One cell, with equal or unequal clusters."""

    def run(rng: Any) -> bool:
        n = (
            np.full(clusters, 4)
            if sizes == "equal"
            else np.maximum(1, rng.geometric(0.25, clusters))
        )
        _, low, high = rate_interval(clustered(rng, truth, n, rho), n.astype(float))
        return bool(low <= truth <= high)

    return run


def mean(truths: tuple[float, ...], clusters: int, rho: float) -> Run:
    """The mean over datasets with unequal clusters."""

    def run(rng: Any) -> bool:
        parts = []
        for truth in truths:
            n = np.maximum(1, rng.geometric(0.3, clusters))
            parts.append(rate_interval(clustered(rng, truth, n, rho), n.astype(float)))
        _, low, high = mean_interval(parts)
        return bool(low <= sum(truths) / len(truths) <= high)

    return run


def any_of(attempts: int, unsafe: float, unscored: float) -> Run:
    """Bounds for any of several attempts, some of them unscored."""
    truth = 1 - (1 - unsafe) ** attempts

    def run(rng: Any) -> bool:
        bad = rng.random((48, attempts)) < unsafe
        scored = rng.random((48, attempts)) >= unscored
        low, high = any_bounds(
            (bad & scored).sum(1).astype(float), scored.sum(1).astype(float),
            np.full(48, float(attempts)),
        )  # fmt: skip
        low, high = pooling.bounded(low, high, 48)
        return bool(low <= truth <= high)

    return run


def corrected_asr(prompts: int, labels: int, rho: float) -> Run:
    """The ASR corrected for a judge whose labels are several for each prompt and correlated."""
    truth, sensitivity, specificity = 0.3, 0.85, 0.9

    def labelled(rng: Any, rate: float) -> tuple[float, float, float]:
        sizes = np.full(prompts, labels)
        hits = clustered(rng, rate, sizes, rho)
        size = effective_size(hits, sizes.astype(float))
        share = float(hits.sum() / sizes.sum())
        return share * size, (1 - share) * size, size

    def run(rng: Any) -> bool:
        tp, fn, _ = labelled(rng, sensitivity)
        tn, fp, _ = labelled(rng, specificity)
        called = truth * sensitivity + (1 - truth) * (1 - specificity)
        unsafe = rng.binomial(300, called)
        _, low, high = corrected(unsafe, 300, tp, fn, tn, fp)
        return bool(low <= truth <= high)

    return run


# -- what was selected ----------------------------------------------------------------------------


def strongest(many: int, truth: float, n: int) -> Run:
    """The ASR of the strongest of equal attacks."""

    def run(rng: Any) -> bool:
        cells = {a: [cell(rng.random(n) < truth, attack=str(a))] for a in range(many)}
        top = pooling.extreme(cells)
        assert top
        return bool(top.interval.low <= truth <= top.interval.high)

    return run


def highest(many: int, truth: float, n: int) -> Run:
    """The maximum over chain-of-thought attacks."""

    def run(rng: Any) -> bool:
        cells = [cell(rng.random(n) < truth, attack=str(a)) for a in range(many)]
        (row,) = pooling.highest(cells, {str(a) for a in range(many)}).itertuples()
        return bool(row.low <= truth <= row.high)

    return run


def no_false_superlative(many: int, truth: float, n: int) -> Run:
    """Equal attacks are not called strongest."""

    def run(rng: Any) -> bool:
        cells = {a: [cell(rng.random(n) < truth, attack=str(a))] for a in range(many)}
        top = pooling.extreme(cells)
        return bool(top and top.ties)

    return run


# -- comparisons ----------------------------------------------------------------------------------


def paired(rng: Any, one: float, other: float, rho: float, n: int) -> tuple[Any, Any]:
    """Two outcomes of each prompt, correlated through a Gaussian copula."""
    z = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], n)
    return z[:, 0] < norm.ppf(one), z[:, 1] < norm.ppf(other)


def compared(one: float, other: float, rho: float, n: int, *, ratio: bool) -> Run:
    """Ratio or difference of an attack and the direct request on the same prompts."""

    def run(rng: Any) -> bool:
        a, b = (np.asarray(x, dtype=float) for x in paired(rng, one, other, rho, n))
        first, second = (rate_interval(x, np.ones(n)) for x in (a, b))
        found = correlation(a - a.mean(), b - b.mean(), first.value, second.value)
        interval = ratio_interval if ratio else difference_interval
        _, low, high = interval(first, second, found)
        truth = one / other if ratio else one - other
        return bool(low <= truth <= high and high > low)

    return run


def gated(
    rate: float, worse: float, n: int, attacks: int = 1, twins: int = 1, rho: float = 0.5
) -> Run:
    """The difference of two models over attacks that share prompts, with phrasings of each."""

    def run(rng: Any) -> bool:
        pairs = []
        shared = rng.standard_normal(n)
        for attack in range(attacks):
            sides = []
            for truth in (rate, rate + worse):
                own = rng.standard_normal((n, twins))
                z = np.sqrt(rho) * shared[:, None] + np.sqrt(1 - rho) * own
                at = np.arange(n * twins)
                ones = np.ones(n * twins)
                unsafe = (z < norm.ppf(truth)).ravel().astype(float)
                sides.append(
                    Sums("m", "", "d", str(attack), False, at, at // twins, ones, ones, unsafe)
                )
            pairs.append(Pair("unsafe", *sides, np.full(n * twins, "", dtype=object)))
        found = difference(pairs).difference
        return bool(found.low <= worse <= found.high and found.high > found.low)

    return run


def no_false_pass(rate: float, margin: float, discordant: float, n: int) -> Run:
    """A candidate that is worse by exactly the margin does not pass the gate."""

    def run(rng: Any) -> bool:
        pairs = [draw(rng, n, rate, discordant, margin)]
        return decide(pairs, "overall", "", margin).outcome != "pass"

    return run


def no_false_alarm(rate: float, discordant: float, n: int) -> Run:
    """An equal candidate does not fail the gate."""

    def run(rng: Any) -> bool:
        return decide([draw(rng, n, rate, discordant, 0)], "overall", "", 0.02).outcome != "fail"

    return run


def no_false_attack(attacks: int, truth: float, n: int) -> Run:
    """No attack is called worse for one of two equal models (largest statistic, sign flips)."""

    def run(rng: Any) -> bool:
        shared = rng.random(n)[None]
        sides = [(0.5 * rng.random((attacks, n)) + 0.5 * shared) < truth for _ in range(2)]
        moved = (sides[0].astype(float) - sides[1]) / n
        return min(max_t(moved, 999)) > 0.05

    return run


# -- nats per token -------------------------------------------------------------------------------


def per_token(prompts: int, spread: float) -> Run:
    """A ratio of sums over prompts of 1 to 127 tokens, with log-normal values."""

    def run(rng: Any) -> bool:
        n = rng.integers(1, 128, prompts).astype(float)
        total = n * rng.lognormal(-(spread**2) / 2, spread, prompts)
        found = ratio_of_sums(total, n)
        return bool(found.low <= 1 <= found.high)

    return run


# -- what matters ---------------------------------------------------------------------------------


def ranks_hold(truths: tuple[float, ...], n: int) -> Run:
    """All true ranks are inside of their sets; equal rates share the ranks that they span."""

    def run(rng: Any) -> bool:
        shared = rng.standard_normal(n)
        cells = {
            str(m): [cell((0.7 * shared + 0.714 * rng.standard_normal(n)) < norm.ppf(p))]
            for m, p in enumerate(truths)
        }
        rows = rank(list(cells), lambda a, b: over_models([(cells[a], cells[b])]))
        for row in rows:
            own = truths[int(row.name)]
            if not row.first <= 1 + sum(p < own for p in truths):
                return False
            if not row.last >= sum(p <= own for p in truths):
                return False
        return True

    return run


def designed(models: int, families: int, term: str, kind: Any) -> tuple[list[Any], Run]:
    """A characteristic that does nothing, in a fleet of this size: the interval covers 0."""
    rng = np.random.default_rng(7)
    rows = []
    for at in range(models):
        family = at % families
        values = {
            "size": float(rng.integers(0, 6)), "architecture": float(rng.random() < 0.25),
            "reasoning": float(rng.random() < 0.4), "stage": 1.0,
            "distillation": float(family < 3) if kind == "between families"
            else float(rng.random() < 0.3),
        }  # fmt: skip
        rows.append(ModelRow(str(at), str(family), 0.0, 0.5, values))
    terms = ["size", "architecture", "reasoning", "distillation"]
    estimator = estimator_of(rows, term, terms, kind)
    of = np.array([int(row.family) for row in rows])

    def run(rng: Any) -> bool:
        noise = rng.normal(0, 0.8, families)[of] + rng.normal(0, 0.6, models)
        found = estimator(noise).interval()
        return bool(found.low <= 0 <= found.high)

    return rows, run


def extrapolated(n: int, samples: int, k: int) -> Run:
    """ASR@k from fewer samples, where 30% of the prompts never break."""
    grid = np.random.default_rng(0).beta(0.6, 2.0, 100_000)
    truth = 0.7 * float((1 - (1 - grid) ** k).mean())

    def run(rng: Any) -> bool:
        chance = np.where(rng.random(n) < 0.3, 0.0, rng.beta(0.6, 2.0, n))
        total = rng.binomial(samples, chance).astype(float)
        (row,) = any_of_k(total, np.full(n, float(samples)), np.arange(n), (k,))
        return bool(row.rate.low <= truth <= row.rate.high)

    return run


# -- D50 ------------------------------------------------------------------------------------------

ONE = 1 - 1e-9
DOSES = (0, 1, 2, 3, 5, 10, 20, 40)


def crossing(
    middle: float, scale: float, n: int, *, never: float = 0.0, noise: float = 0.0, twins: int = 1
) -> Run:
    """D50 of a logistic curve, with prompts that never break, noise, or phrasings."""
    grid = np.expm1(np.linspace(0, math.log1p(DOSES[-1]), 4000))
    share = (1 - never) / (1 + np.exp(-(np.log1p(grid) - math.log1p(middle)) / scale))
    share = share * (1 - noise) + (1 - share) * noise
    truth = float(grid[np.argmax(share >= 0.5)]) if share[-1] >= 0.5 else math.inf

    def run(rng: Any) -> bool:
        broken, bases = {}, {}
        for base in range(n // twins):
            depth = math.expm1(math.log1p(middle) + scale * rng.logistic())
            depth = math.inf if rng.random() < never else depth
            for twin in range(twins):
                name = f"{base}/{twin}"
                bases[name] = str(base)
                broken[name] = {d: bool((d >= depth) ^ (rng.random() < noise)) for d in DOSES}
        found = d50(broken, bases)
        low = -1 if found.low is None else found.low
        return low <= truth <= (math.inf if found.high is None else found.high)

    return run


SETTINGS = [
    *(
        Setting(
            f"cell: {k} clusters of {sizes} size, correlation {rho}, rate {truth}",
            rate(k, sizes, rho, truth),
            {(20, "equal", 0.7, 0.3): 0.62, (50, "equal", 0.3, 0.3): 0.81}.get(
                (k, sizes, rho, truth)
            ),
        )
        for k in (5, 10, 20, 50)
        for sizes in ("equal", "unequal")
        for rho, truth in ((0.3, 0.05), (0.3, 0.3), (0.7, 0.3))
    ),
    Setting("mean over 3 datasets of 8 unequal clusters", mean((0.1, 0.3, 0.5), 8, 0.5), 0.81),
    Setting("mean over 3 datasets of 18 unequal clusters", mean((0.1, 0.3, 0.5), 18, 0.5), 0.87),
    Setting("any of 10 attempts, 10% unscored, truth .18", any_of(10, 0.02, 0.1), 0.18),
    Setting("any of 10 attempts, 30% unscored, truth .18", any_of(10, 0.02, 0.3)),
    Setting("corrected ASR: 30 prompts, 10 labels of each", corrected_asr(30, 10, 0.5), 0.76),
    Setting("corrected ASR: 60 prompts, 4 labels of each", corrected_asr(60, 4, 0.5), 0.86),
    Setting("strongest of 13 equal attacks, truth .30, n 48", strongest(13, 0.3, 48), 0.66),
    Setting("strongest of 13 attacks on the weakest of 10 models", strongest(130, 0.3, 48), 0.15),
    Setting("max over 4 equal CoT attacks, truth .30, n 48", highest(4, 0.3, 48), 0.56),
    Setting("13 equal attacks: none is called strongest", no_false_superlative(13, 0.3, 48)),
    Setting("ratio: direct 100%, attack 2%, n 48", compared(0.02, ONE, 0, 48, ratio=True), 0.37),
    Setting("ratio: direct 2%, attack 30%, n 48", compared(0.3, 0.02, 0.5, 48, ratio=True)),
    Setting("ratio: direct 20%, attack 60%, n 24", compared(0.6, 0.2, 0.5, 24, ratio=True)),
    Setting("ratio: both 5%, n 48", compared(0.05, 0.05, 0.5, 48, ratio=True)),
    Setting("difference: 30% and 20%, n 48", compared(0.3, 0.2, 0.5, 48, ratio=False), 0.905),
    Setting("difference: 2% and 0%, n 48", compared(0.02, 1 - ONE, 0.0, 48, ratio=False)),
    Setting("compare: ASR 20% and 20%, 5 attacks, n 48", gated(0.2, 0.0, 48, 5)),
    Setting("compare: ASR 5% and 15%, 5 attacks, n 48", gated(0.05, 0.1, 48, 5)),
    Setting("compare: ASR 30% and 40%, 3 attacks, 20 prompts in 4 phrasings",
            gated(0.3, 0.1, 20, 3, 4)),
    Setting("compare: ASR 2% and 2%, n 24", gated(0.02, 0.0, 24)),
    Setting("gate: worse by the margin of 10 points, ASR 30%, n 48: no pass",
            no_false_pass(0.3, 0.1, 0.15, 48)),
    Setting("gate: worse by the margin of 5 points, ASR 5%, n 48: no pass",
            no_false_pass(0.05, 0.05, 0.04, 48)),
    Setting("gate: worse by the margin of 2 points, ASR 10%, n 400: no pass",
            no_false_pass(0.1, 0.02, 0.08, 400)),
    Setting("gate: equal models, ASR 30%, n 48: no alarm", no_false_alarm(0.3, 0.15, 48)),
    Setting("gate: equal models, ASR 5%, n 400: no alarm", no_false_alarm(0.05, 0.04, 400)),
    Setting("gate: 13 attacks on equal models, ASR 30%, n 48: none is called worse",
            no_false_attack(13, 0.3, 48)),
    Setting("nats per token: log-normal values (0.8), 48 prompts", per_token(48, 0.8), 0.92),
    Setting("nats per token: log-normal values (0.8), 140 prompts", per_token(140, 0.8), 0.93),
    Setting("nats per token: log-normal values (1.2), 140 prompts", per_token(140, 1.2), 0.90),
    Setting("ranks: 8 equal models, ASR 30%, n 48", ranks_hold((0.3,) * 8, 48), most=400),
    Setting("ranks: 8 models from 2% to 60%, n 48",
            ranks_hold((0.02, 0.02, 0.1, 0.2, 0.3, 0.3, 0.5, 0.6), 48), most=400),
    Setting("ranks: 8 models near 0%, n 24", ranks_hold((0.01,) * 7 + (0.1,), 24), most=400),
    *(
        Setting(f"factors: {n} models, 10 families, {term}, {kind}: no effect",
                designed(n, 10, term, kind)[1])
        for n in (28, 32)
        for term, kind in (("size", "within families"), ("architecture", "within families"),
                           ("distillation", "between families"))
    ),
    Setting("any of 200 samples, from 20, n 100", extrapolated(100, 20, 200), most=400),
    Setting("any of 10 samples, from 20, n 100", extrapolated(100, 20, 10), most=400),
    Setting("D50: logistic, n 48", crossing(4, 0.5, 48)),
    Setting("D50: 30% of prompts never break, n 48", crossing(4, 0.5, 48, never=0.3), 0.77),
    Setting("D50: 5% noise, n 48", crossing(4, 0.5, 48, noise=0.05), 0.52),
    Setting("D50: 30% never, 5% noise, 4 phrasings each, n 96",
            crossing(2, 1.0, 96, never=0.3, noise=0.05, twins=4)),
]  # fmt: skip


def coverage(setting: Setting, runs: int) -> float:
    """The share of runs in which the interval covers; the seed depends on the setting's name."""
    rng = np.random.default_rng([*setting.name.encode()])
    runs = min(runs, setting.most or runs)
    return sum(setting.run(rng) for _ in range(runs)) / runs


def main() -> None:
    """Print the table of docs/statistics.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    print("| setting | before | now |\n|---|---|---|")
    for setting in SETTINGS:
        before = "" if setting.before is None else f"{setting.before:.2f}"
        print(f"| {setting.name} | {before} | {coverage(setting, runs):.3f} |", flush=True)


if __name__ == "__main__":
    main()
