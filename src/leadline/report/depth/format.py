"""Depth measures as text: numbers with their intervals, and parts of sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...text import percent, span
from .schema import D50, P, Point

HALF = 0.5
FIRST = 5
"""The number of answer positions that count as the start of the answer, for KL, loss and
gradient."""


def greatest(points: Sequence[P]) -> P:
    """The point with the greatest value; among equal ones, the last."""
    return max(reversed(points), key=lambda point: point.known)


def below(lower: Point, upper: Point) -> bool:
    """Whether the interval of one point lies entirely below that of another."""
    return lower.high is not None and upper.low is not None and lower.high < upper.low


# -- numbers --------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A number with about two significant digits: `0.52`, `8.3`, `14`; whole numbers and numbers
    above 99 with all digits before the point, from a billion on in scientific notation."""
    if abs(value) >= 1e9:
        return f"{value:.1e}"
    if abs(value) < 0.001:
        return f"{value:.1g}"
    if value == int(value) or abs(value) >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.2g}"


def count(value: float, unit: str) -> str:
    """`1 token`, `2 tokens`; `unit` is in the plural."""
    return f"{number(value)} {unit.removesuffix('s') if value == 1 else unit}"


def share(value: float, low: float | None, high: float | None) -> str:
    """A share and its interval in percent: `100% [86%, 100%]`; the share alone where the interval
    is not known."""
    return percent(value) if low is None or high is None else f"{percent(value)} {span(low, high)}"


def rate(point: Point) -> str:
    """The value of a point and its interval in percent."""
    return share(point.known, point.low, point.high)


def of_prompts(point: Point) -> str:
    """The number of prompts of a point: `of 48 prompts`."""
    return f"of {count(point.n, 'prompts')}" if point.n else "of the prompts"


def nats(point: Point) -> str:
    """The value of a point and its interval as numbers: `8.3 [8.1, 8.5]`."""
    if point.low is None or point.high is None:
        return number(point.known)
    return f"{number(point.known)} [{number(point.low)}, {number(point.high)}]"


# -- D50 ------------------------------------------------------------------------------------------


def d50_zero(found: D50) -> bool:
    """Whether half of the prompts are broken at dose 0: by direct requests, before any step."""
    return found.censored != "above" and (found.at if found.censored else found.value) == 0


def d50_number(found: D50) -> str:
    """D50 with its unit, for a table: `10 tokens`, `> 80 steps`, `≤ 1 step`, `none needed`; empty
    where D50 is not known."""
    return d50_text(found).replace("more than ", "> ").replace("at most ", "≤ ")


def d50_text(found: D50) -> str:
    """D50 in words: `10 steps`, `more than 80 steps`, `at most 1 step`, `none needed`; empty where
    D50 is not known."""
    value = found.at if found.censored else found.value
    if value is None:
        return ""
    if d50_zero(found):
        return "none needed"
    sign = {"above": "more than ", "below": "at most "}.get(found.censored or "", "")
    return f"{sign}{count(value, found.unit or 'units')}"


def d50_interval(found: D50, tried: Sequence[float]) -> str:
    """The interval of a D50: `[8, 13]`; an end outside of the doses tried is written as in
    `[8, above 40]`. Empty where neither end is known, and where both are dose 0."""
    if found.low is None and found.high is None:
        return ""
    low = number(found.low) if found.low is not None else _outside("below", tried)
    high = number(found.high) if found.high is not None else _outside("above", tried)
    return "" if low == high == "0" else f"[{low}, {high}]"


def _outside(side: str, tried: Sequence[float]) -> str:
    if not tried:
        return "unknown"
    end = min(tried) if side == "below" else max(tried)
    return "0" if side == "below" and end == 0 else f"{side} {number(end)}"


def d50_phrase(found: D50, tried: Sequence[float]) -> str:
    """D50 in words with its interval, the number of examples and the first passage:
    `10 steps [8, 13] (80 examples; first passage: 8.5)`."""
    examples = d50_examples(found)
    beside = [count(examples, "examples")] if examples else []
    if found.first_passage is not None:
        beside.append(f"first passage: {number(found.first_passage)}")
    text = f"{d50_text(found)} {d50_interval(found, tried)}".rstrip()
    return f"{text} ({'; '.join(beside)})" if beside else text


def d50_examples(found: D50) -> float | None:
    """The number of training examples that a D50 in steps corresponds to; None where it is not
    known."""
    steps = found.at if found.censored else found.value
    if not steps or found.examples_per_step is None:
        return None
    return steps * found.examples_per_step


# -- sentences ------------------------------------------------------------------------------------


def per_model(texts: Iterable[tuple[float, str]]) -> str:
    """Join the texts of models, given with a number to sort by. Of more than three models, only the
    texts with the lowest and the highest number are shown."""
    pairs = list(texts)
    if len(pairs) <= 3:
        return "; ".join(text for _, text in pairs)
    pairs.sort(key=lambda pair: pair[0])
    (least, low), (most, high) = pairs[0], pairs[-1]
    if least == most:
        return f"{low}; the same for {len(pairs) - 1} other models"
    return f"{low}; the highest of {len(pairs)} models: {high}"


def listed(names: Iterable[str]) -> str:
    """Join names: `a, b and c`."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def named(models: Sequence[str]) -> str:
    """Join names of models: `a, b and c`; more than three as `a, b and 2 more`."""
    rest = [f"{len(models) - 2} more"] if len(models) > 3 else models[2:]
    return listed([*models[:2], *rest])


def sentence(text: str) -> str:
    """The text on one line, ending in one full stop."""
    return " ".join(text.split()).rstrip(".") + "."
