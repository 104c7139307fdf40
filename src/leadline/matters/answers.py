"""What goes with safety alignment in a study: every analysis, and at most ten sentences.

A sentence is printed only where its interval excludes "no difference" (or the ranks are apart);
what the data could not answer is listed with what it would take. No sentence says what causes what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..analysis.intervals import Interval
from ..records import LeadlineError
from ..store import Store
from ..text import percent, plain, span, visible
from . import external, factors, matched
from .compared import over_attacks, over_models
from .external import AnyOf, Battery, Parts, Technique
from .factors import Analysis
from .matched import MatchedDifference
from .ranking import Ranked, rank
from .subjects import Subject, subjects

MOST = 10
_KS = (1, 2, 5, 10, 100, 1000)


@dataclass(frozen=True)
class Sentence:
    """A result in words, with its number and interval, and the Python expression that reproduces
    it; in the expression, `m` is `leadline.what_matters(DIR)`."""

    text: str
    value: float
    low: float
    high: float
    query: str


@dataclass(frozen=True)
class Answers:
    """Everything that `leadline matters` computes, and the sentences about it."""

    sentences: tuple[Sentence, ...]
    unanswered: tuple[str, ...]
    ranking: tuple[Ranked, ...]
    families: tuple[Ranked, ...]
    matched: tuple[MatchedDifference, ...]
    factors: Analysis
    techniques: tuple[Technique, ...]
    attack_families: tuple[Ranked, ...]
    battery: Battery | None
    any_of: dict[tuple[str, str], list[AnyOf]]
    parts: tuple[Parts, ...]

    def to_dict(self) -> dict[str, Any]:
        """The content of matters.json; unknown and infinite numbers are null."""
        content = asdict(self)
        content["any_of"] = [
            {"model": model, "attack": attack, "curve": [asdict(each) for each in curve]}
            for (model, attack), curve in self.any_of.items()
        ]
        for row in (*content["matched"], *content["techniques"]):
            found = row.pop("found")
            row |= {key: found[key] for key in ("difference", "baseline", "candidate", "prompts")}
        result: dict[str, Any] = plain(content)
        return result


def what_matters(folder: str | Path, judge: str | None = None) -> Answers:
    """Analyse the study in a results folder. Raises LeadlineError if it has no scored answers."""
    with Store(Path(folder)) as store:
        found = subjects(store, judge)
        families = store.description("families") or {}
        parts = external.parts(store)
    found = [subject for subject in found if subject.cells.get("unsafe")]
    if not found:
        raise LeadlineError(f"{folder} has no scored answers to harmful prompts: run its study")
    matches = matched.compare_matched(matched.matched_pairs(found))
    results: dict[str, Any] = {
        "ranking": tuple(_rank_models(found)),
        "families": tuple(_rank_families(found)),
        "matched": tuple(matches),
        "factors": factors.analyse(found),
        "techniques": tuple(external.techniques(found, families)),
        "attack_families": tuple(external.rank_families(found, families)),
        "battery": external.smallest_battery(found),
        "any_of": external.samples(found, _KS),
        "parts": tuple(parts),
    }
    answers = Answers((), (), **results)
    return Answers(tuple(_sentences(answers)[:MOST]), tuple(_unanswered(answers)), **results)


def _rank_models(found: Sequence[Subject]) -> list[Ranked]:
    return rank(
        found,
        lambda one, other: over_attacks(one.cells["unsafe"], other.cells["unsafe"], "unsafe"),
        lambda subject: subject.name,
    )


def _rank_families(found: Sequence[Subject]) -> list[Ranked]:
    """Families as the mean over their models, on the attacks that all models have."""
    own: dict[str, list[Subject]] = {}
    for subject in found:
        if subject.traits["family"]:
            own.setdefault(str(subject.traits["family"]), []).append(subject)
    if len(own) < 2:
        return []
    common = set.intersection(*(set(s.cells["unsafe"]) for s in found))

    def pair(one: str, other: str) -> Any:
        ours, theirs = own[one], own[other]
        return over_models([
            (a.cells["unsafe"][attack], b.cells["unsafe"][attack])
            for a in ours for b in theirs for attack in sorted(common)
        ])  # fmt: skip

    return rank(list(own), pair)


# -- sentences ------------------------------------------------------------------------------------


def _sentences(found: Answers) -> list[Sentence]:
    return [
        *_of_techniques(found), *_of_ranking(found), *_of_matched(found), *_of_factors(found),
        *_of_families(found), *_of_parts(found), *_of_battery(found),
    ]  # fmt: skip


def _of_techniques(found: Answers) -> list[Sentence]:
    sentences = []
    for at, row in enumerate(found.techniques):
        if row.name not in ("response prefix", "all jailbreaks", "gradient search"):
            continue
        gap = row.found.difference
        if gap.low <= 0 <= gap.high:
            continue
        change = "higher" if gap.value > 0 else "lower"
        text = (
            f"With {_technique(row.name)}, the attack success rate is {_points(gap)} points "
            f"{change} than with direct requests (mean over {row.models} models and "
            f"{row.attacks} attacks; {_times(row.ratio)})."
        )
        sentences.append(_sentence(text, gap, f"m.techniques[{at}].found.difference"))
    return sentences


def _technique(name: str) -> str:
    return {"response prefix": "a forged response prefix", "all jailbreaks": "a jailbreak",
            "gradient search": "a suffix found by gradient search"}[name]  # fmt: skip


def _of_ranking(found: Answers) -> list[Sentence]:
    rows = found.ranking
    if len(rows) < 2:
        return []
    sentences = []
    for at, row in ((0, rows[0]), (len(rows) - 1, rows[-1])):
        if row.first == row.last:
            which = "safest" if row.first == 1 else "least safe"
            text = (
                f"{row.name} is the {which} of {len(rows)} models by attack success rate over "
                f"the attacks that they share: {_rate(row.rate)}."
            )
            sentences.append(_sentence(text, row.rate, f"m.ranking[{at}].rate"))
    return sentences


_MORE = {
    "size": "larger model", "architecture": "mixture of experts",
    "reasoning": "model that thinks", "stage": "post-trained model",
    "distillation": "distilled model", matched.TRAINING: "model trained further",
}  # fmt: skip


def _of_matched(found: Answers) -> list[Sentence]:
    sentences = []
    for name in dict.fromkeys(row.characteristic for row in found.matched):
        own = [(at, row) for at, row in enumerate(found.matched) if row.characteristic == name]
        clear = [
            (at, row) for at, row in own
            if not row.found.difference.low <= 0 <= row.found.difference.high
        ]  # fmt: skip
        if not clear:
            continue
        up = sum(row.found.difference.value > 0 for _, row in clear)
        at, row = max(clear, key=lambda each: abs(each[1].found.difference.value))
        gap = row.found.difference
        text = (
            f"Matched pairs that differ in {name} ({len(own)}): the attack success rate of the "
            f"{_MORE[name]} is clearly higher in {up} and clearly lower in {len(clear) - up}; the "
            f"largest difference is {_signed(gap)} points, {row.more} against {row.less}."
        )
        sentences.append(_sentence(text, gap, f"m.matched[{at}].found.difference"))
    return sentences


def _of_factors(found: Answers) -> list[Sentence]:
    sentences = []
    for at, effect in enumerate(found.factors.effects):
        if effect.p_holm > 0.05:
            continue
        times = Interval(*(_exp(x) for x in effect.estimate))
        note = "" if effect.kind == "within families" else " (exploratory: between families)"
        text = (
            f"Over {len(found.factors.rows)} models, one step of {effect.unit} goes with "
            f"{times.value:.2g} times the odds of an unsafe answer [{times.low:.2g}, "
            f"{times.high:.2g}]{note}."
        )
        sentences.append(_sentence(text, effect.estimate, f"m.factors.effects[{at}].estimate"))
    return sentences


def _of_families(found: Answers) -> list[Sentence]:
    rows = found.attack_families
    if len(rows) < 2 or rows[-1].first != rows[-1].last:
        return []
    top = rows[-1]
    text = (
        f"Of {len(rows)} kinds of attack, {top.name} has the highest mean attack success rate: "
        f"{_rate(top.rate)}."
    )
    return [_sentence(text, top.rate, "m.attack_families[-1].rate")]


def _of_parts(found: Answers) -> list[Sentence]:
    sentences = []
    for at, row in enumerate(found.parts):
        if row.only_thought.low > 0.01:
            text = (
                f"{row.model}: in {_rate(row.only_thought)} of the responses the thought is unsafe "
                "and the answer is safe, so that judging answers alone misses them."
            )
            sentences.append(_sentence(text, row.only_thought, f"m.parts[{at}].only_thought"))
    return sentences


def _of_battery(found: Answers) -> list[Sentence]:
    battery = found.battery
    if battery is None or len(battery.attacks) == battery.of:
        return []
    text = (
        f"{len(battery.attacks)} of {battery.of} attack settings ({', '.join(battery.attacks)}) "
        f"find {_rate(battery.found)} of the breaks on prompts that were not used to choose them."
    )
    return [_sentence(text, battery.found, "m.battery.found")]


def _unanswered(found: Answers) -> list[str]:
    texts = [f"{each.characteristic}: {each.reason}" for each in found.factors.unanswered]
    texts += [
        f"{effect.characteristic}: no clear association ({effect.kind}; on this design a factor of "
        f"two in the odds would be found in {percent(effect.power)} of studies)"
        for effect in found.factors.effects
        if effect.p_holm > 0.05
    ]
    if found.factors.left_out:
        texts.append(
            f"models without a complete card are in no regression: "
            f"{', '.join(found.factors.left_out)}: give their `card:` in the study file"
        )
    names = {row.name for row in found.techniques}
    for name, attack in (("response prefix", "prefill or cot_prefix_forged"),
                         ("all jailbreaks", "family:persona"), ("gradient search",
                         "gcg_transfer_harmbench")):  # fmt: skip
        if name not in names:
            texts.append(f"{name}: not measured: add attacks, such as {attack}, and direct")
    if not found.matched:
        texts.append("matched pairs: none: add two models that differ in one characteristic")
    if not found.any_of:
        texts.append("any of k samples: one sample of each prompt: set sampling: {samples: 10}")
    if not found.parts:
        texts.append("thought and answer: no model with a thought was judged by parts")
    return [visible(text) for text in texts]


def _sentence(text: str, found: Interval, query: str) -> Sentence:
    return Sentence(visible(text), *found, query)


def _rate(found: Interval) -> str:
    return f"{percent(found.value)} {span(found.low, found.high)}"


def _points(found: Interval) -> str:
    sign = -1 if found.value < 0 else 1
    low, high = sorted((sign * found.low, sign * found.high))
    return f"{100 * abs(found.value):.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _signed(found: Interval) -> str:
    return "{:+.0f} [{:+.0f}, {:+.0f}]".format(*(100 * x for x in found))


def _times(found: Interval) -> str:
    if found.value != found.value or found.value == float("inf"):
        return "the ratio is not defined, since the rate of direct requests is 0"
    if found.high == float("inf"):
        return f"ratio {found.value:.2f}, at least {found.low:.2f}"
    return f"ratio {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _exp(x: float) -> float:
    from math import exp

    return exp(min(x, 700.0))
