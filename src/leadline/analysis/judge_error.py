"""How far a judge can be trusted, by people's labels, and what its errors make of an ASR.

A judge calls a share `sensitivity` of the unsafe answers unsafe and a share `specificity` of the
safe ones safe. Measured on labelled answers, the two turn the ASR that the judge reports into an
estimate of the one that people would have found (Rogan and Gladen 1978), with an interval that
carries both the sampling of the answers and the judge's own uncertainty (Lang and Reiczigel 2014).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from ..records import LeadlineError
from ..store import Store
from ..study import JudgePick
from .agreement import without_nan
from .intervals import LEVEL, Interval, wilson

if TYPE_CHECKING:
    import pandas as pd

CORRECTED = ["asr_corrected", "low_corrected", "high_corrected"]


@dataclass(frozen=True)
class Control:
    """Answers of one made-up kind, of which everybody knows what they are."""

    name: str
    expected: str
    n: int
    right: int
    unscored: int


@dataclass(frozen=True)
class Check:
    """What a judge made of answers that people had labelled; what it left unscored is apart.

    tp and fn count unsafe answers that it called unsafe and safe, tn and fp safe answers that it
    called safe and unsafe.
    """

    judge: str
    settings: dict[str, Any]
    labels: str
    tp: int
    fn: int
    tn: int
    fp: int
    unscored_unsafe: int
    unscored_safe: int
    kappa: Interval
    controls: tuple[Control, ...] = ()

    @property
    def sensitivity(self) -> Interval:
        return _share(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> Interval:
        return _share(self.tn, self.tn + self.fp)

    def to_json(self) -> dict[str, Any]:
        rates = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        named = {name: rate._asdict() for name, rate in {**rates, "kappa": self.kappa}.items()}
        return {name: without_nan(value) for name, value in (asdict(self) | named).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Check:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        kappa = Interval(*(_number(data["kappa"][part]) for part in Interval._fields))
        controls = tuple(Control(**control) for control in data["controls"])
        counts = ("tp", "fn", "tn", "fp", "unscored_unsafe", "unscored_safe")
        if any(not isinstance(data[name], int) or data[name] < 0 for name in counts):
            raise ValueError("counts")
        names = ("judge", "settings", "labels", *counts)
        return Check(**{name: data[name] for name in names}, kappa=kappa, controls=controls)


def _share(hits: int, n: int) -> Interval:
    return Interval(hits / n if n else math.nan, *wilson(hits, n))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# -- an ASR, corrected --------------------------------------------------------------------------


def corrected(
    unsafe: float, n: float, tp: int, fn: int, tn: int, fp: int, level: float = LEVEL
) -> Interval:
    """The ASR behind `unsafe` of `n` verdicts of a judge with these counts against labels.

    The estimate is Rogan and Gladen's, held to [0, 1]; the interval is Lang and Reiczigel's
    (2014, eq. 16 and 17), in which the estimates of all three rates are drawn towards the middle
    a little. Nothing is known, (nan, 0, 1), where the judge is no better than chance, or where
    its verdicts contradict its check (none of 100 unsafe, by a judge that called a quarter of the
    safe answers so): then these answers are not like those that were labelled.
    """
    if not n or not tp + fn or not tn + fp:
        return Interval(math.nan, math.nan, math.nan)
    youden = tp / (tp + fn) + tn / (tn + fp) - 1
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    unsafes, safes, trials = tp + fn + 2, tn + fp + 2, n + z2
    se, sp, rate = (tp + 1) / unsafes, (tn + 1) / safes, (unsafe + z2 / 2) / trials
    gain = se + sp - 1
    if youden <= 0 or gain <= 0:
        return Interval(math.nan, 0.0, 1.0)
    asr = min(max((unsafe / n + tn / (tn + fp) - 1) / youden, 0.0), 1.0)
    middle = (rate + sp - 1) / gain
    var_se, var_sp = se * (1 - se) / unsafes, sp * (1 - sp) / safes
    shift = 2 * z2 * (middle * var_se - (1 - middle) * var_sp)
    variance = rate * (1 - rate) / trials + middle**2 * var_se + (1 - middle) ** 2 * var_sp
    half = math.sqrt(z2 * variance) / gain
    low, high = middle + shift - half, middle + shift + half
    if high <= 0 or low >= 1:
        return Interval(math.nan, 0.0, 1.0)
    return Interval(asr, max(0.0, min(low, asr)), min(1.0, max(high, asr)))


def add_corrected(frame: pd.DataFrame, checks: Mapping[str, Check]) -> pd.DataFrame:
    """The frame with asr_corrected, low_corrected and high_corrected, NaN where the judge has no
    check.

    It has columns judge, n, asr, low and high. Where these intervals stand for repeated prompts,
    the rate counts as one over so many independent answers as would give an interval of that
    width, so that the correction keeps the clusters.
    """
    rows = []
    for judge, n, asr, low, high in frame[["judge", "n", "asr", "low", "high"]].itertuples(
        index=False, name=None
    ):
        check = checks.get(judge)
        if check is None or not n or math.isnan(asr):
            rows.append(Interval(math.nan, math.nan, math.nan))
            continue
        size = effective(asr, low, high, most=n)
        rows.append(corrected(asr * size, size, check.tp, check.fn, check.tn, check.fp))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(CORRECTED)}
    return frame.assign(**columns)


def effective(rate: float, low: float, high: float, most: float) -> float:
    """How many independent answers, at most `most`, have a Wilson interval as wide as this."""

    def width(n: float) -> float:
        below, above = wilson(rate * n, n)
        return above - below

    few, many = min(1.0, most), float(most)
    if width(many) >= high - low:
        return many
    for _ in range(60):
        middle = (few + many) / 2
        few, many = (middle, many) if width(middle) > high - low else (few, middle)
    return many


# -- checks in files and stores -----------------------------------------------------------------


def load_check(path: Path, pick: JudgePick) -> Check:
    """The check that `leadline judges check` wrote. Raises LeadlineError where it can't be read,
    or where it measured another judge than `pick`, or the same one with other settings."""
    again = f"write it with: leadline judges check LABELS --judge {pick.name} --out {path}"
    try:
        check = Check.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise LeadlineError(f"check: cannot read {path} ({error.strerror}): {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LeadlineError(f"check: {path} is no judge check: {again}") from None
    if (check.judge, check.settings) != (pick.name, pick.deciding):
        ours, theirs = (json.dumps(s, sort_keys=True) for s in (pick.deciding, check.settings))
        raise LeadlineError(
            f"check: {path} measured {check.judge} {theirs}, and the study has {pick.name} {ours}: "
            "measure the same judge"
        )
    return check


def keep_check(store: Store, judge: int, pick: JudgePick, locate: Callable[[str], Path]) -> None:
    """Store the check that the judge's option `check:` names, or that it has none any more."""
    name, given = f"check:{judge}", pick.options.get("check")
    if given:
        store.describe(name, load_check(locate(str(given)), pick).to_json())
    elif store.description(name):
        store.describe(name, None)


def checks(store: Store) -> dict[str, Check]:
    """The checks that a store holds, by the judges' names (the newest judge of a name)."""
    found = {}
    for name, id in store.query("SELECT name, MAX(id) FROM judges GROUP BY name"):
        if data := store.description(f"check:{id}"):
            found[name] = Check.from_json(data)
    return found
