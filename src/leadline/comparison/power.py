"""Before a run: what a comparison with this many prompts could decide, by simulation.

Every simulated study draws two models' answers to each prompt and puts them through the gate. Each
prompt has one answer, so for a study of several attacks the result is conservative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..analysis.sums import Sums
from ..records import LeadlineError
from .gate import POWER, Row, decide
from .pairs import Pair

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

RUNS = 300
_STEPS = 8  # halvings of the searched range: a 256th of it


@dataclass(frozen=True)
class Power:
    """What a comparison of `prompts` base prompts can decide, where the baseline has the ASR `rate`
    and two equal models differ on a share `discordant` of the prompts.

    `passes_if_equal` is how often an equal candidate passes at the margin, `fails_at_margin` how
    often one that is worse by exactly the margin fails, and `passes_at_margin` how often it passes
    (the rate of false passes). `detectable` is the smallest regression that fails in 80% of
    studies, `provable` the smallest margin at which an equal candidate passes in 80%; None where
    there is none up to 100% less the rate.
    """

    prompts: int
    rate: float
    discordant: float
    margin: float
    passes_if_equal: float
    passes_at_margin: float
    fails_at_margin: float
    detectable: float | None
    provable: float | None


def power(
    prompts: int,
    rate: float,
    margin: float,
    *,
    discordant: float | None = None,
    runs: int = RUNS,
    seed: int = 0,
) -> Power:
    """Simulate comparisons. `discordant` is rate * (1 - rate) by default, which is a correlation of
    one half between the two models' answers. Raises LeadlineError for invalid values."""
    if prompts < 2:
        raise LeadlineError(f"the number of prompts is {prompts}: give 2 or more")
    if not 0 <= rate < 1:
        raise LeadlineError(f"the ASR of the baseline is {rate}: give a share from 0 to below 1")
    if not 0 < margin < 1 - rate:
        raise LeadlineError(f"the margin is {margin}: give a share between 0 and {1 - rate:g}")
    share = rate * (1 - rate) if discordant is None else discordant
    if not 0 <= share <= 2 * min(rate, 1 - rate):
        raise LeadlineError(
            f"the share of discordant prompts is {share}: with an ASR of {rate:g} it is from 0 to "
            f"{2 * min(rate, 1 - rate):g}"
        )

    def frequency(worse: float, within: float, holds: Callable[[Row], bool]) -> float:
        import numpy as np

        rng = np.random.default_rng([seed, prompts])
        rows = (decide([draw(rng, prompts, rate, share, worse)], "overall", "", within)
                for _ in range(runs))  # fmt: skip
        return sum(map(holds, rows)) / runs

    def passes(row: Row) -> bool:
        return row.outcome == "pass"

    def fails(row: Row) -> bool:
        return row.difference.low > 0

    return Power(
        prompts,
        rate,
        share,
        margin,
        frequency(0.0, margin, passes),
        frequency(margin, margin, passes),
        frequency(margin, margin, lambda row: row.outcome == "fail"),
        _smallest(lambda worse: frequency(worse, margin, fails), 1 - rate),
        _smallest(lambda within: frequency(0.0, within, passes), 1 - rate),
    )


def draw(rng: Any, prompts: int, rate: float, discordant: float, worse: float) -> Pair:
    """The answers of two models to the same prompts: the baseline is unsafe on a share `rate`, and
    the candidate on `rate + worse`."""
    import numpy as np

    first = rng.random(prompts) < rate
    fixed = discordant / 2 / rate if rate else 0.0
    broken = (discordant / 2 + worse) / (1 - rate)
    flips = rng.random(prompts) < np.where(first, fixed, min(1.0, broken))
    categories = np.full(prompts, "", dtype=object)
    return Pair("unsafe", verdicts(first), verdicts(first ^ flips), categories)


def verdicts(unsafe: Any) -> Sums:
    """One scored answer to each of as many base prompts: whether it is unsafe, [prompts]."""
    import numpy as np

    at, once = np.arange(len(unsafe)), np.ones(len(unsafe))
    return Sums("", "", "", "", False, at, at, once, once, unsafe.astype(float))


def _smallest(frequency: Callable[[float], float], most: float) -> float | None:
    """The smallest value up to `most` with a frequency of at least 80%, by bisection."""
    low, high = 0.0, most
    if frequency(high) < POWER:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if frequency(middle) >= POWER else (middle, high)
    return high
