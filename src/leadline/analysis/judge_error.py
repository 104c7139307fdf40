"""A judge's error rates against human labels, and the ASR corrected for them.

`sensitivity` is the share of unsafe answers that a judge calls unsafe, `specificity` the share of
safe answers that it calls safe. Measured on labelled answers, they turn the ASR that the judge
reports into an estimate of the ASR by human labels (Rogan and Gladen 1978). The interval includes
the sampling error of the answers and that of the two rates (Lang and Reiczigel 2014).
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
    """A judge's verdicts on `n` control answers of one kind, whose correct verdict is known by
    construction: `expected`, "safe" or "unsafe". `right` and `unscored` count verdicts."""

    name: str
    expected: str
    n: int
    right: int
    unscored: int


@dataclass(frozen=True)
class JudgeCheck:
    """A judge's verdicts on answers with human labels.

    `judge` and `settings` identify the judge (see `JudgePick.verdict_settings`); `labels` is the
    name of the labels' file. `tp` and `fn` count answers labelled unsafe that the judge called
    unsafe and safe; `tn` and `fp` count answers labelled safe that it called safe and unsafe.
    `unscored_unsafe` and `unscored_safe` count unscored answers by label; they are in no rate.
    `unscored_reason` is the first reason, which may be that of an unscored control. `kappa` is
    Cohen's kappa between the judge and the labels.

    Answers to one prompt are not independent: `effective_unsafe` and `effective_safe` are numbers
    of independent answers with the same uncertainty (None: as many as were counted).
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
    effective_unsafe: float | None = None
    effective_safe: float | None = None
    unscored_reason: str = ""

    @property
    def effective_counts(self) -> tuple[float, float, float, float]:
        """tp, fn, tn and fp, scaled to the effective numbers of answers."""
        unsafe, safe = self.tp + self.fn, self.tn + self.fp
        scale = _scale(self.effective_unsafe, unsafe), _scale(self.effective_safe, safe)
        return self.tp * scale[0], self.fn * scale[0], self.tn * scale[1], self.fp * scale[1]

    @property
    def unscored(self) -> int:
        """The number of labelled answers and controls without a verdict."""
        controls = sum(control.unscored for control in self.controls)
        return self.unscored_unsafe + self.unscored_safe + controls

    @property
    def sensitivity(self) -> Interval:
        """tp / (tp + fn), with Wilson's interval, clustered by prompt."""
        tp, fn, _, _ = self.effective_counts
        return _share(tp, tp + fn)

    @property
    def specificity(self) -> Interval:
        """tn / (tn + fp), with Wilson's interval, clustered by prompt."""
        _, _, tn, fp = self.effective_counts
        return _share(tn, tn + fp)

    def to_json(self) -> dict[str, Any]:
        """The fields, sensitivity and specificity as JSON types; NaN becomes None."""
        rates = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        named = {name: rate._asdict() for name, rate in {**rates, "kappa": self.kappa}.items()}
        return {name: without_nan(value) for name, value in (asdict(self) | named).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> JudgeCheck:
        """Read what `to_json` returned. Raises KeyError, TypeError or ValueError for other data."""
        kappa = Interval(*(_number(data["kappa"][part]) for part in Interval._fields))
        controls = tuple(Control(**control) for control in data["controls"])
        counts = ("tp", "fn", "tn", "fp", "unscored_unsafe", "unscored_safe")
        if any(not isinstance(data[name], int) or data[name] < 0 for name in counts):
            raise ValueError("counts")
        names = ("judge", "settings", "labels", *counts)
        sizes = {name: data.get(name) for name in ("effective_unsafe", "effective_safe")}
        if any(
            s is not None and not (isinstance(s, int | float) and s >= 0) for s in sizes.values()
        ):
            raise ValueError("effective numbers")
        fields = {name: data[name] for name in names} | sizes
        return JudgeCheck(
            **fields,
            kappa=kappa,
            controls=controls,
            unscored_reason=str(data.get("unscored_reason", "")),
        )


def _scale(effective: float | None, n: int) -> float:
    return 1.0 if effective is None or not n else effective / n


def _share(hits: float, n: float) -> Interval:
    return Interval(hits / n if n else math.nan, *wilson(hits, n))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# -- the corrected ASR --------------------------------------------------------------------------


def corrected(
    unsafe: float, n: float, tp: float, fn: float, tn: float, fp: float, level: float = LEVEL
) -> Interval:
    """The ASR corrected for a judge's errors, where the judge called `unsafe` of `n` answers unsafe
    and has the counts `tp`, `fn`, `tn`, `fp` against labels.

    The estimate is Rogan and Gladen's, clipped to [0, 1]; the interval is Lang and Reiczigel's
    (2014, eq. 16 and 17), which shrinks the estimates of all three rates towards 1/2.

    Returns (nan, nan, nan) without answers or without labels of both kinds. Returns (nan, 0, 1) if
    the judge is no better than chance, or if its verdicts contradict its check (for example 0 of
    100 answers unsafe by a judge that called a quarter of the safe answers unsafe): then these
    answers differ from the labelled ones, and the correction does not apply.
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
    center = (rate + sp - 1) / gain
    var_se, var_sp = se * (1 - se) / unsafes, sp * (1 - sp) / safes
    shift = 2 * z2 * (center * var_se - (1 - center) * var_sp)
    variance = rate * (1 - rate) / trials + center**2 * var_se + (1 - center) ** 2 * var_sp
    half = math.sqrt(z2 * variance) / gain
    low, high = center + shift - half, center + shift + half
    if high <= 0 or low >= 1:
        return Interval(math.nan, 0.0, 1.0)
    return Interval(asr, max(0.0, min(low, asr)), min(1.0, max(high, asr)))


def add_corrected(frame: pd.DataFrame, checks: Mapping[str, JudgeCheck]) -> pd.DataFrame:
    """Add the columns asr_corrected, low_corrected and high_corrected to a frame with the columns
    judge, n, asr, low and high; NaN where the judge has no check.

    An interval from clustered trials is wider than one from n independent answers. The correction
    uses the number of independent answers that would give an interval of that width (`effective`),
    so that it keeps the clustering.
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
        rows.append(corrected(asr * size, size, *check.effective_counts))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(CORRECTED)}
    return frame.assign(**columns)


def effective(rate: float, low: float, high: float, most: float) -> float:
    """The effective sample size: the number of independent answers, at most `most`, whose Wilson
    interval is as wide as [low, high]. Found by bisection."""

    def width(n: float) -> float:
        below, above = wilson(rate * n, n)
        return above - below

    lower, upper = min(1.0, most), float(most)
    if width(upper) >= high - low:
        return upper
    for _ in range(60):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if width(middle) > high - low else (lower, middle)
    return upper


# -- checks in files and stores -----------------------------------------------------------------


def load_check(path: Path, pick: JudgePick) -> JudgeCheck:
    """Read a file that `leadline judges check` wrote. Raises LeadlineError if it cannot be read, or
    if it is a check of another judge than `pick` or of other settings."""
    fix = f"write it with: leadline judges check LABELS --judge {pick.name} --out {path}"
    try:
        check = JudgeCheck.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise LeadlineError(f"check: cannot read {path} ({error.strerror}): {fix}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LeadlineError(f"check: {path} is not a judge check: {fix}") from None
    if (check.judge, check.settings) != (pick.name, pick.verdict_settings):
        in_study, in_file = (
            json.dumps(settings, sort_keys=True)
            for settings in (pick.verdict_settings, check.settings)
        )
        raise LeadlineError(
            f"check: {path} measured the judge {check.judge} {in_file}, but the study uses "
            f"{pick.name} {in_study}: run leadline judges check for that judge"
        )
    return check


def store_check(store: Store, judge: int, pick: JudgePick, locate: Callable[[str], Path]) -> None:
    """Store the check that the judge's option `check:` names, or remove a stored one if the option
    is not set. `judge` is the judge's row id."""
    name, path = f"check:{judge}", pick.options.get("check")
    if path:
        store.describe(name, load_check(locate(str(path)), pick).to_json())
    elif store.description(name):
        store.describe(name, None)


def stored_checks(store: Store) -> dict[str, JudgeCheck]:
    """The checks in a store, by judge name (of the newest judge with that name)."""
    by_name = {}
    for name, id in store.query("SELECT name, MAX(id) FROM judges GROUP BY name"):
        if data := store.description(f"check:{id}"):
            by_name[name] = JudgeCheck.from_json(data)
    return by_name
