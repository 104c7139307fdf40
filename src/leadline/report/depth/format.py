"""Numbers of the depth measures in words, with what is known of their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from .schema import D50, Depth, Point
from ...text import percent, span

HALF = 0.5
DATA = {
    "harmful": "harmful examples",
    "identity": "identity-shifting examples",
    "backdoor": "examples with a hidden trigger",
    "benign": "benign examples",
}


P = TypeVar("P", bound=Point)


# -- the points of a model ------------------------------------------------------------------------


def of(points: Iterable[P], model: str) -> list[P]:
    return [point for point in points if point.model == model]


def models(depth: Depth, points: Iterable[Point]) -> list[str]:
    having = {point.model for point in points}
    return [name for name in depth.names if name in having]


def each(said: Iterable[tuple[float, str]]) -> str:
    """What is said of each model; of more than three, what is said of the least and the greatest
    of the numbers that stand first."""
    told = list(said)
    if len(told) <= 3:
        return "; ".join(what for _, what in told)
    told.sort(key=lambda pair: pair[0])
    (least, low), (greatest, high) = told[0], told[-1]
    if least == greatest:
        return f"{low}; the other {len(told) - 1} come to the same"
    return f"{low}; at the other end of {len(told)} models, {high}"


def most(points: Sequence[P]) -> P:
    """The point of the greatest value; of equals the last."""
    return max(reversed(points), key=got)


def prompts(point: Point) -> str:
    return f"of {count(point.n, 'prompts')}" if point.n else "of the prompts"


def plainly(depth: Depth, model: str) -> Point | None:
    """The ASR without any attack, wherever it was measured."""
    asked: list[Point] = [point for point in of(depth.prefill, model) if point.k == 0]
    asked += [point for point in of(depth.refusal_prefix, model) if not point.prefix]
    asked += [p for p in of(depth.finetuning, model) if p.step == 0 and p.data == "harmful"]
    return asked[0] if asked else None


# -- numbers --------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Two digits that count: 0.52, 8.3, 14, 120; whole numbers as they are."""
    if abs(value) >= 1e9:
        return f"{value:.1e}"
    if abs(value) < 0.001:
        return f"{value:.1g}"
    if value == int(value) or abs(value) >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.2g}"


def count(many: float, what: str) -> str:
    """1 token, 2 tokens; `what` is in the plural."""
    return f"{number(many)} {what.removesuffix('s') if many == 1 else what}"


def share(value: float, low: float | None, high: float | None) -> str:
    """100% [86%, 100%]; without its interval where that is not known."""
    return percent(value) if low is None or high is None else f"{percent(value)} {span(low, high)}"


def rate(point: Point) -> str:
    return share(got(point), point.low, point.high)


def got(point: Point) -> float:
    """The value of a point that has one: `depth_data.parse` has dropped the others."""
    return 0.0 if point.value is None else point.value


def nats(point: Point) -> str:
    """8.3 [8.1, 8.5]"""
    if point.low is None or point.high is None:
        return number(got(point))
    return f"{number(got(point))} [{number(point.low)}, {number(point.high)}]"


def sign(found: D50) -> str:
    """10; > 80; ≤ 1. Empty where it is not known."""
    if found.censored and found.at is not None:
        mark = "> " if found.censored == "above" else "≤ " if found.at else ""
        return mark + number(found.at)
    return "" if found.value is None else number(found.value)


def d50(found: D50) -> str:
    """10 steps; more than 80 steps; at most 1 step. Empty where it is not known."""
    many = found.at if found.censored else found.value
    if many is None:
        return ""
    said = sign(found).replace("> ", "more than ").replace("≤ ", "at most ")
    unit = found.unit or "units"
    return f"{said} {unit.removesuffix('s') if many == 1 else unit}"


def ends(found: D50, tried: Sequence[float]) -> str:
    """[8, 13]; an end outside of what was tried is told as such; empty where neither is known."""
    if found.low is None and found.high is None:
        return ""
    low = number(found.low) if found.low is not None else _outside("below", tried)
    high = number(found.high) if found.high is not None else _outside("above", tried)
    return f"[{low}, {high}]"


def _outside(side: str, tried: Sequence[float]) -> str:
    return f"{side} {number(min(tried) if side == 'below' else max(tried))}" if tried else "unknown"


def examples(found: D50) -> float | None:
    """How many examples that many steps are."""
    many = found.at if found.censored else found.value
    known = many is not None and found.examples_per_step is not None
    return many * found.examples_per_step if known else None  # type: ignore[operator]


def listed(names: Iterable[str]) -> str:
    """a, b and c"""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def named(models: Sequence[str]) -> str:
    """a, b and c; of more than three, the first two and how many more."""
    more = [f"{len(models) - 2} more"] if len(models) > 3 else models[2:]
    return listed([*models[:2], *more])


def stop(sentence: str) -> str:
    """One line that ends in one full stop."""
    return " ".join(sentence.split()).rstrip(".") + "."
