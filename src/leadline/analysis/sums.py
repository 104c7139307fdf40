"""What was measured on each prompt: the sums that every rate and interval is computed from.

A base prompt is a cluster: its phrasings, samples and attacks are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ..records import LeadlineError
from ..registry import unknown
from ..store import Store
from .attempts import TOLERANCE, any_missing_at_random
from .intervals import LEVEL, UNKNOWN, Interval, rate_interval

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Integers = np.ndarray[Any, np.dtype[np.int64]]

Measure = Literal["unsafe", "refusal", "utility"]
"""What is averaged: `unsafe` over harmful prompts, `refusal` and `utility` over harmless ones."""

# Trials with the chosen judge's verdict. A trial that failed or does not apply has none, whatever
# an earlier run may have left. The joins are in the order in which rows are stored.
TRIALS = """
FROM cells c CROSS JOIN trials t ON t.cell = c.id CROSS JOIN prompts p ON p.id = t.prompt
LEFT JOIN chosen j ON j.dataset = c.dataset
LEFT JOIN verdicts v ON v.cell = t.cell AND v.prompt = t.prompt AND v.sample = t.sample
  AND v.judge = j.judge AND t.outcome NOT IN ('failed', 'not_applicable')
"""


def chosen(store: Store, judge: str | None) -> str:
    """The SQL of a table `chosen(dataset, judge)`: each dataset's primary judge, or the newest
    judge with the given name for all datasets. Raises LeadlineError for an unknown name."""
    if judge is None:
        return "WITH chosen AS (SELECT dataset, judge FROM primary_judges) "
    known = dict(store.query("SELECT name, MAX(id) FROM judges GROUP BY name"))
    if judge not in known:
        raise LeadlineError(f"in {store.path}: {unknown('judge', judge, known)}")
    return f"WITH chosen AS (SELECT DISTINCT dataset, {int(known[judge])} AS judge FROM cells) "


@dataclass(frozen=True, eq=False)
class Sums:
    """One cell (model, thinking, dataset, attack) prompt by prompt: arrays of [prompts].

    `prompt` are ids and `base` the indices of their base prompts within the dataset; `attempts`
    counts trials that apply, `scored` those with a verdict, and `total` sums what is measured over
    the scored ones. In cells of several attempts of which any counts (`any`), each prompt counts
    once.
    """

    model: str
    thinking: str
    dataset: str
    attack: str
    any: bool
    prompt: Integers
    base: Integers
    attempts: Floats
    scored: Floats
    total: Floats

    @cached_property
    def n(self) -> Floats:
        """How often each prompt counts: scored trials, or once if any trial was scored."""
        return (self.scored > 0).astype(float) if self.any else self.scored

    @cached_property
    def sum(self) -> Floats:
        """What each prompt contributes to the numerator of the rate."""
        if not self.any:
            return self.total
        chance = any_missing_at_random(self.total, self.scored, self.attempts)
        return chance * (self.scored > 0)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The rate with unscored trials as 0 and as 1; (0, 1) where nothing applies."""
        apply = self.attempts > 0
        if not apply.any():
            return 0.0, 1.0
        if self.any:
            hit = self.total > 0
            unknown = ~hit & (self.scored < self.attempts)
            return float(hit[apply].mean()), float((hit | unknown)[apply].mean())
        attempts = float(self.attempts.sum())
        low = float(self.total.sum()) / attempts
        return low, low + float((self.attempts - self.scored).sum()) / attempts

    @property
    def estimable(self) -> bool:
        """Whether a point estimate is reported: something was scored, and of several attempts of
        which any counts, the unscored ones could not change the rate of the prompts with a scored
        attempt by more than 2 points."""
        some = self.scored > 0
        if not some.any():
            return False
        unknown = (self.total == 0) & (self.scored < self.attempts)
        return not (self.any and float(unknown[some].mean()) > TOLERANCE)

    def by_base(self) -> tuple[Floats, Floats]:
        """Numerator and denominator by base prompt: two of [base prompts of the dataset]."""
        import numpy as np

        size = int(self.base.max()) + 1 if len(self.base) else 0
        total = np.bincount(self.base, self.sum, size).astype(float)
        n = np.bincount(self.base, self.n, size).astype(float)
        return total, n

    def interval(self, level: float = LEVEL) -> Interval:
        """The rate with its interval, clustered by base prompt; unknown if not `estimable`."""
        if not self.estimable:
            return UNKNOWN
        return rate_interval(*self.by_base(), level)

    @property
    def prompts(self) -> int:
        """The number of base prompts that count."""
        return int((self.by_base()[1] > 0).sum())

    def influence(self, size: int) -> Floats:
        """By how much each base prompt moves the rate: [size], 0 for those not in the cell."""
        import numpy as np

        total, n = self.by_base()
        found = np.zeros(size)
        found[: len(n)] = (total - n * total.sum() / n.sum()) / n.sum()
        return found


def sums(
    store: Store,
    of: Measure = "unsafe",
    judge: str | None = None,
    model: tuple[str, str] | None = None,
) -> list[Sums]:
    """Every cell, in the order in which models, datasets and attacks were begun. `model` (with its
    thinking mode) selects those of one model."""
    import numpy as np

    harmful = of == "unsafe"
    select = (
        f"{chosen(store, judge)} SELECT t.prompt, SUM(t.outcome <> 'not_applicable'), "
        f"COUNT(v.{of}), TOTAL(v.{of}) {TRIALS} WHERE c.id = ? AND p.harmful = ? GROUP BY t.prompt"
    )
    bases: dict[str, dict[int, int]] = {}
    found = []
    for id, name, thinking, dataset, attack, pool in store.query(
        "SELECT id, model, thinking, dataset, attack, pool FROM cells c ORDER BY "
        "(SELECT min(m.id) FROM cells m WHERE m.model = c.model AND m.thinking = c.thinking), id"
    ):
        if model and model != (name, thinking):
            continue
        rows = np.array(store.query(select, (id, harmful)), dtype=float).reshape(-1, 4)
        if not len(rows):
            continue
        if dataset not in bases:
            bases[dataset] = _bases(store, dataset)
        prompt = rows[:, 0].astype(np.int64)
        base = np.array([bases[dataset][at] for at in prompt.tolist()], dtype=np.int64)
        found.append(
            Sums(
                name, thinking, dataset, attack, pool == "any", prompt, base,
                rows[:, 1], rows[:, 2], rows[:, 3],
            )
        )  # fmt: skip
    return found


def _bases(store: Store, dataset: str) -> dict[int, int]:
    """The index of each prompt's base prompt within a dataset, by prompt id."""
    names: dict[str, int] = {}
    return {
        id: names.setdefault(base, len(names))
        for id, base in store.query(
            "SELECT id, base FROM prompts WHERE dataset = ? ORDER BY id", (dataset,)
        )
    }
