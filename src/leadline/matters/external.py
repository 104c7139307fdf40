"""Attack techniques over the models of a study: amplification, any of k, the smallest battery, and
where the thought and the answer of a model differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from ..analysis.intervals import (
    LEVEL,
    Interval,
    correlation,
    rate_interval,
    ratio_interval,
)
from ..analysis.pooling import attack_key
from ..analysis.sums import Sums
from ..comparison.pairs import Difference, Pair, difference
from ..registry import plugins
from ..store import Store
from .compared import over_models
from .ranking import Ranked, rank
from .subjects import Subject

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

_RESAMPLES = 200
SHARE = 0.95
"""The share of the breaks that the smallest battery has to find."""


@dataclass(frozen=True)
class Technique:
    """A group of attacks against direct requests, as the mean over models, attacks and datasets.

    `ratio` is the amplification, `found` the difference (candidate minus direct); `models` and
    `attacks` are how many are in.
    """

    name: str
    models: int
    attacks: int
    ratio: Interval
    found: Difference


def technique_of(families: Mapping[str, str]) -> dict[str, str]:
    """The technique of each attack of a study, by its label: "response prefix" (attacks that write
    the start of the response), "gradient search", or "jailbreak: FAMILY"."""
    needs = {plugin.name: plugin.needs for plugin in plugins("attack")}
    found = {}
    for label, family in families.items():
        if label == "direct":
            continue
        if "response_prefix" in needs.get(attack_key(label), ()):
            found[label] = "response prefix"
        else:
            found[label] = "gradient search" if family == "gradient" else f"jailbreak: {family}"
    return found


def techniques(subjects: Sequence[Subject], families: Mapping[str, str]) -> list[Technique]:
    """Every technique against direct requests, over the models that have both."""
    groups: dict[str, list[str]] = {}
    for label, name in technique_of(families).items():
        groups.setdefault(name, []).append(label)
        if name.startswith("jailbreak: "):
            groups.setdefault("all jailbreaks", []).append(label)
    rows = []
    for name, attacks in groups.items():
        cells, models, used = [], set(), set()
        for subject in subjects:
            own = subject.cells.get("unsafe", {})
            for attack in attacks:
                if attack in own and "direct" in own:
                    cells.append((own["direct"], own[attack]))
                    models.add(subject.name)
                    used.add(attack_key(attack))
        pairs = over_models(cells)
        if pairs:
            found = difference(pairs)
            rows.append(Technique(name, len(models), len(used), _ratio(found), found))
    return rows


def rank_families(subjects: Sequence[Subject], families: Mapping[str, str]) -> list[Ranked]:
    """Techniques with the ranks that each can hold, the weakest first: each pair of techniques on
    the models that have both, as means over their attacks."""
    labels: dict[str, list[str]] = {}
    for label, name in technique_of(families).items():
        labels.setdefault(name, []).append(label)

    def pair(one: str, other: str) -> list[Pair]:
        cells = []
        for subject in subjects:
            own = subject.cells.get("unsafe", {})
            ours = [own[a] for a in labels[one] if a in own]
            theirs = [own[a] for a in labels[other] if a in own]
            # Both sides need the same number of cells for their means to weigh attacks equally.
            if ours and theirs:
                size = math.lcm(len(ours), len(theirs))
                cells += [
                    (ours[at % len(ours)], theirs[at % len(theirs)])
                    for at in range(min(size, len(ours) * len(theirs)))
                ]
        return over_models(cells)

    return rank(list(labels), pair)


def _ratio(found: Difference) -> Interval:
    """The ratio of the two rates of a difference, with their correlation implied by it."""
    one, other = found.candidate, found.baseline
    own = correlation_of(found)
    return ratio_interval(one, other, own)


def correlation_of(found: Difference) -> float:
    """The correlation of the two estimates of a difference."""
    return correlation(
        found.candidate_by_prompt,
        found.baseline_by_prompt,
        found.candidate.value,
        found.baseline.value,
    )


# -- any of k -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnyOf:
    """ASR if a prompt counts as broken by any of k samples; `observed` says whether so many samples
    were taken (otherwise the value is extrapolated)."""

    k: int
    rate: Interval
    observed: bool


def any_of(total: Floats, scored: Floats, base: Floats, ks: Sequence[int]) -> list[AnyOf]:
    """ASR@k from several samples of each prompt: `total` unsafe of `scored` ones, [prompts].

    Up to the number of samples, the estimate is unbiased: 1 - C(s - u, k) / C(s, k) by prompt (Chen
    et al. 2021). Beyond, the rates of the prompts follow a beta distribution with mass at 0, fitted
    by maximum likelihood (beta-binomial, as in Hughes et al. 2024 for best-of-n); intervals are
    percentiles of a bootstrap of base prompts.
    """
    import numpy as np

    seen = scored > 0
    total, scored, base = total[seen], scored[seen], base[seen]
    if not len(total):
        return []
    most = int(scored.min())
    names, of = np.unique(base, return_inverse=True)
    # Prompts with the same counts have the same likelihood: a resample is their weights.
    pairs, same = np.unique(np.column_stack([total, scored]), axis=0, return_inverse=True)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), _RESAMPLES)
    weights = [np.bincount(same, row[of], len(pairs)).astype(float) for row in draws]
    unsafe, of_samples = pairs[:, 0], pairs[:, 1]
    first = _beta_binomial(unsafe, of_samples, np.bincount(same).astype(float))
    fits = [first, *(_beta_binomial(unsafe, of_samples, row, first) for row in weights)]
    rows = []
    for k in ks:
        if k <= most:
            each = _at_k(total, scored, k)
            size = len(names)
            sums = np.bincount(of, each, size).astype(float)
            n = np.bincount(of, minlength=size).astype(float)
            rows.append(AnyOf(k, rate_interval(sums, n), True))
        else:
            values = np.array([_broken_at(fit, k) for fit in fits])
            low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            value = float(values[0])
            rows.append(AnyOf(k, Interval(value, min(low, value), max(high, value)), False))
    return rows


def _at_k(total: Floats, scored: Floats, k: int) -> Floats:
    import numpy as np
    from scipy.special import gammaln

    safe = scored - total
    miss = np.where(
        safe >= k,
        np.exp(
            gammaln(safe + 1) - gammaln(np.maximum(safe - k, 0) + 1)
            - gammaln(scored + 1) + gammaln(scored - k + 1)
        ),
        0.0,
    )  # fmt: skip
    return 1 - np.asarray(miss, dtype=float)


def _beta_binomial(
    total: Floats, scored: Floats, weights: Floats, start: Floats | None = None
) -> Floats:
    """Logit of the mass at 0 and logs of a and b, by maximum likelihood."""
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import betaln, digamma, expit

    zero, safe = total == 0, scored - total

    def unlikely(x: Floats) -> tuple[float, Floats]:
        """Minus the log-likelihood, and its gradient."""
        never = expit(x[0])
        a, b = np.exp(np.clip(x[1:], -8, 8))
        inside = np.exp(betaln(total + a, safe + b) - betaln(a, b))
        chance = (1 - never) * inside + never * zero + 1e-300
        share = weights * (1 - never) * inside / chance
        both = digamma(a + b) - digamma(scored + a + b)
        gradient = np.array([
            (weights * (zero - inside) / chance).sum() * never * (1 - never),
            (share * (digamma(total + a) - digamma(a) + both)).sum() * a,
            (share * (digamma(safe + b) - digamma(b) + both)).sum() * b,
        ])  # fmt: skip
        return -float((weights * np.log(chance)).sum()), -gradient

    starts = [np.array([-3.0, -1.0, 1.0]), np.zeros(3)] if start is None else [start]
    bounds = [(-12.0, 12.0), (-8.0, 8.0), (-8.0, 8.0)]
    fits = [minimize(unlikely, each, jac=True, method="L-BFGS-B", bounds=bounds) for each in starts]
    best: Floats = min(fits, key=lambda fit: float(fit.fun)).x
    return best


def _broken_at(fit: Floats, k: int) -> float:
    import numpy as np
    from scipy.special import betaln, expit

    a, b = np.exp(np.clip(fit[1:], -8, 8))
    return float((1 - expit(fit[0])) * (1 - np.exp(betaln(a, b + k) - betaln(a, b))))


# -- the smallest battery -------------------------------------------------------------------------


@dataclass(frozen=True)
class Battery:
    """The smallest set of attacks, chosen step by step on one half of the prompts, that finds 95%
    of the breaks there; `found` is the share of the breaks that it finds in the other half."""

    attacks: tuple[str, ...]
    of: int
    found: Interval
    breaks: int


def smallest_battery(subjects: Sequence[Subject]) -> Battery | None:
    """Over all models. A break is a prompt that some attack breaks for some model. None where
    either half has no break or there are fewer than two attacks."""
    import numpy as np

    broken: dict[tuple[str, str, int], set[str]] = {}
    base: dict[tuple[str, str, int], tuple[str, int]] = {}
    attacks: dict[str, None] = {}
    for subject in subjects:
        for attack, cells in subject.cells.get("unsafe", {}).items():
            attacks[attack] = None
            for cell in cells:
                hit = cell.total > 0
                rows = zip(cell.prompt[hit].tolist(), cell.base[hit].tolist(), strict=True)
                for prompt, own in rows:
                    key = (subject.name, cell.dataset, prompt)
                    broken.setdefault(key, set()).add(attack)
                    base[key] = (cell.dataset, own)
    halves: list[list[tuple[str, str, int]]] = [[], []]
    for key in broken:
        digest = blake2b(repr(base[key]).encode(), digest_size=2).digest()
        halves[digest[0] % 2].append(key)
    if len(attacks) < 2 or not all(halves):
        return None
    train, test = halves
    chosen: list[str] = []
    left = [broken[key] for key in train]
    while len(left) > (1 - SHARE) * len(train):
        counts = {attack: sum(attack in found for found in left) for attack in attacks}
        best = max(counts, key=lambda attack: counts[attack])
        chosen.append(best)
        left = [found for found in left if best not in found]
    names = {name: at for at, name in enumerate(dict.fromkeys(base[key] for key in test))}
    total, n = np.zeros((2, len(names)))
    for key in test:
        n[names[base[key]]] += 1
        total[names[base[key]]] += bool(broken[key] & set(chosen))
    return Battery(tuple(chosen), len(attacks), rate_interval(total, n), len(test))


# -- thought and answer ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """How often only the thought, only the answer, or both are unsafe, among the trials whose judge
    scored both parts of a response with a thought."""

    model: str
    n: int
    only_thought: Interval
    only_answer: Interval
    both: Interval


def parts(store: Store) -> list[Parts]:
    """By model and thinking mode, over all attacks on harmful prompts, clustered by base prompt."""
    import numpy as np

    rows = store.query(
        "SELECT o.model, o.thinking, o.dataset, o.base, o.thought_unsafe, o.answer_unsafe "
        "FROM outcomes o JOIN responses r ON r.key = o.key WHERE o.harmful AND r.thought > '' "
        "AND o.thought_unsafe IS NOT NULL AND o.answer_unsafe IS NOT NULL"
    )
    by_model: dict[tuple[str, str], list[tuple[tuple[str, str], bool, bool]]] = {}
    for model, thinking, dataset, base, thought, answer in rows:
        by_model.setdefault((model, thinking), []).append(
            ((dataset, base), bool(thought), bool(answer))
        )
    found = []
    for (model, thinking), own in by_model.items():
        names = {name: at for at, name in enumerate(dict.fromkeys(base for base, _, _ in own))}
        of = np.array([names[base] for base, _, _ in own])
        thought, answer = (np.array([row[i] for row in own]) for i in (1, 2))
        n = np.bincount(of).astype(float)
        rates = [
            rate_interval(np.bincount(of, which, len(names)).astype(float), n)
            for which in (thought & ~answer, ~thought & answer, thought & answer)
        ]
        name = Subject(model, thinking, None, {}).name
        found.append(Parts(name, len(own), *rates))
    return found


def samples(subjects: Sequence[Subject], ks: Sequence[int]) -> dict[tuple[str, str], list[AnyOf]]:
    """ASR@k by model and attack, where prompts have several samples."""
    found = {}
    for subject in subjects:
        for attack, cells in subject.cells.get("unsafe", {}).items():
            if max(int(cell.scored.max()) for cell in cells) > 1:
                found[subject.name, attack] = any_of(*_joined(cells), ks)
    return found


def _joined(cells: Sequence[Sums]) -> tuple[Floats, Floats, Any]:
    import numpy as np

    base = np.concatenate([
        np.array([f"{cell.dataset} {at}" for at in cell.base.tolist()]) for cell in cells
    ])  # fmt: skip
    total, scored = (
        np.concatenate([getattr(cell, name) for cell in cells]) for name in ("total", "scored")
    )
    return total, scored, base
