"""D50: the dose at which half of the prompts are broken.

A dose is a number of prefilled tokens, or of fine-tuning steps. The ASR at each dose is made
monotone by isotonic regression, and D50 is where it crosses one half, interpolated on the scale
log(1 + dose). Its interval assumes no parametric curve: it reaches from the largest dose at which
the ASR is clearly below one half to the smallest dose at which it is clearly above (test inversion
with the clustered intervals of `analysis.intervals`).

First passage is computed in the same way from the share of prompts that were broken by the dose or
a smaller one. It is below D50 where answers are not monotone in the dose, for instance under
sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..analysis.intervals import Interval, correlation, difference_interval, rate_interval
from ..analysis.pooling import simultaneous
from ..records import LeadlineError
from ..report.depth.schema import D50

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["D50", "d50"]

Broken = Mapping[str, Mapping[int, bool]]
"""By prompt id and dose, whether the prompt was broken; a missing dose is unknown."""


def d50(broken: Broken, bases: Mapping[str, str], unit: str = "tokens") -> D50:
    """The dose at which half of the prompts are broken, and the first passage.

    `bases` maps prompt ids to base prompts ("" for the prompt itself), by which intervals are
    clustered. Where the ASR clearly falls from one dose to a larger one, D50 is not defined, and
    `note` gives the reason. The result does not depend on the order of the input. Raises
    LeadlineError where no prompt was scored at any dose.
    """
    known = {prompt: dict(doses) for prompt, doses in sorted(broken.items()) if doses}
    if not known:
        raise LeadlineError("D50: no prompt was scored at any dose: see the reasons of the trials")
    tried = sorted({dose for doses in known.values() for dose in doses})
    clusters = {base: n for n, base in enumerate(sorted({bases[p] or p for p in known}))}
    cluster_of = [clusters[bases[p] or p] for p in known]
    curve = _Curve.of(tried, list(known.values()), cluster_of)
    value, low, high, censored = curve.crossing()
    passages = [_first_passage(doses, tried) for doses in known.values()]
    passage = _Curve.of(tried, passages, cluster_of).crossing()
    note = curve.falls()
    if note:
        value, censored = None, None
    return D50(
        value=value,
        low=low,
        high=high,
        censored=censored,
        at=tried[0] if censored == "below" else tried[-1],
        unit=unit,
        n=len(known),
        first_passage=passage[0],
        first_passage_low=passage[1],
        first_passage_high=passage[2],
        note=note,
    )


def _first_passage(doses: Mapping[int, bool], tried: Sequence[int]) -> dict[int, bool]:
    """By dose, whether the prompt was broken by it or a smaller one; empty if a dose is unknown."""
    passed: dict[int, bool] = {}
    broken, complete = False, True
    for dose in tried:
        broken |= doses.get(dose, False)
        complete &= dose in doses
        passed[dose] = broken
    # Leaving out only the doses that are uncertain would remove unbroken prompts more often than
    # broken ones, and raise the share.
    return passed if complete else {}


# Value, lower end, upper end, censoring.
Crossing = tuple[float | None, float | None, float | None, Literal["above", "below"] | None]


class _Curve:
    """Shares of broken prompts by dose, with their intervals."""

    def __init__(self, tried: Sequence[int], totals: Floats, sizes: Floats) -> None:
        """`totals` are numbers of broken and `sizes` of scored prompts, [doses, clusters]."""
        scored = [row for row, n in enumerate(sizes.sum(1)) if n]
        self.tried = [tried[row] for row in scored]
        self.totals, self.sizes = totals[scored], sizes[scored]
        pairs = zip(self.totals, self.sizes, strict=True)
        self.points = [rate_interval(total, n) for total, n in pairs]

    @staticmethod
    def of(
        tried: Sequence[int], prompts: Sequence[Mapping[int, bool]], clusters: Sequence[int]
    ) -> _Curve:
        """The curve of `prompts`, each of them in the cluster at the same index."""
        import numpy as np

        totals, sizes = np.zeros((2, len(tried), max(clusters) + 1))
        rows = {dose: row for row, dose in enumerate(tried)}
        for doses, cluster in zip(prompts, clusters, strict=True):
            for dose, broken in doses.items():
                sizes[rows[dose], cluster] += 1
                totals[rows[dose], cluster] += broken
        return _Curve(tried, totals, sizes)

    def crossing(self) -> Crossing:
        """The dose at which the isotonic curve crosses one half (None: outside of the doses), the
        ends of its interval (None: outside of the doses), and on which side it is censored."""
        import numpy as np
        from scipy.optimize import isotonic_regression

        if not self.points:
            return None, None, None, None
        scaled = np.log1p(self.tried)
        rates = np.array([point.value for point in self.points])
        fitted = isotonic_regression(rates, weights=self.sizes.sum(1)).x
        below = [dose for dose, p in zip(self.tried, self.points, strict=True) if p.high < 0.5]
        above = [dose for dose, p in zip(self.tried, self.points, strict=True) if p.low > 0.5]
        low = float(max(below)) if below else None
        high = float(min(above)) if above else None
        if low is not None and high is not None and low > high:  # not monotone, see `falls`
            low, high = high, low
        after = int(np.argmax(fitted >= 0.5))  # the first dose at or above one half
        if fitted[-1] < 0.5:
            return None, low, high, "above"
        if after == 0:
            return None, low, high, "below"
        share = (0.5 - fitted[after - 1]) / (fitted[after] - fitted[after - 1])
        crossing = scaled[after - 1] + share * (scaled[after] - scaled[after - 1])
        value = round(float(np.expm1(crossing)), 9)
        low = low if low is None else min(low, value)
        high = high if high is None else max(high, value)
        return value, low, high, None

    def falls(self) -> str:
        """A message if the share clearly falls from one dose to a larger one (with simultaneous
        intervals over all pairs of doses); "" otherwise."""
        pairs = [(i, j) for j in range(len(self.points)) for i in range(j)]
        level = simultaneous(len(pairs))
        for i, j in pairs:
            if self.points[j].value >= self.points[i].value:
                continue
            smaller, larger = (rate_interval(self.totals[n], self.sizes[n], level) for n in (i, j))
            difference = difference_interval(larger, smaller, self._correlation(i, j))
            if difference.high < 0:
                return (
                    f"the ASR falls from {_percent(self.points[i])} at {self.tried[i]} to "
                    f"{_percent(self.points[j])} at {self.tried[j]}, so D50 is not defined"
                )
        return ""

    def _correlation(self, i: int, j: int) -> float:
        """The correlation of the shares at two doses, over clusters."""
        rates = [self.points[n].value for n in (i, j)]
        residuals = (
            self.totals[n] - self.sizes[n] * rate for n, rate in zip((i, j), rates, strict=True)
        )
        return correlation(*residuals, *rates)


def _percent(point: Interval) -> str:
    return "unknown" if math.isnan(point.value) else f"{100 * point.value:.0f}%"
