"""What the depth measures say, in plain words. Every sentence follows from the numbers and states
their intervals; where an interval reaches across half, it claims no more than what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .along import FIRST, divergence, forced_tokens
from .schema import D50, MEASURES, Depth, Finetuning, Point, parse
from .format import (
    DATA,
    HALF,
    count,
    d50,
    each,
    ends,
    examples,
    got,
    listed,
    models,
    most,
    nats,
    number,
    of,
    plainly,
    prompts,
    rate,
    share,
    stop,
)
from ...text import percent, shorten, visible


def findings(data: Mapping[str, Any]) -> list[str]:
    """The sentences for what stands in depth.json, the weightiest first; at least one.

    Raises LeadlineError for data that do not hold its schema.
    """
    depth = parse(data)
    said = [sentence for sentences in readings(depth).values() for sentence in sentences]
    return [*(said or ["Nothing has been measured yet."]), *missing(depth)]


def readings(depth: Depth) -> dict[str, list[str]]:
    """By measure, in the order of their weight."""
    parts = {
        "prefill": forced_tokens, "kl": divergence, "finetuning": _finetuning, "gcg": _gcg,
        "decoding": _decoding, "refusal_prefix": _refusal_prefix, "token_loss": _first_token,
        "training": _training,
    }  # fmt: skip
    return {name: [visible(stop(said)) for said in part(depth)] for name, part in parts.items()}


# -- other attacks ------------------------------------------------------------------------------


def _refusal_prefix(depth: Depth) -> list[str]:
    said = []
    for model in models(depth, depth.refusal_prefix):
        points = of(depth.refusal_prefix, model)
        asked = next((p for p in points if not p.prefix), None)
        starts = sorted((p for p in points if p.prefix), key=got)
        if not starts or not asked:
            continue
        fell = [p for p in starts if _apart(p, asked)]
        each = [f"{rate(p)} (“{shorten(p.prefix, 60)}”)" for p in starts]
        head = f"unsafe answers of {model} fall from {rate(asked)} {prompts(asked)}"
        forced = "put into the model’s mouth"
        if len(fell) < len(starts):
            many = f"{len(fell)} clearly lower{'s' * (len(fell) == 1)}"
            many = many if fell else "none clearly lowers"
            which = f"Of {len(starts)} refusal starts {forced}, {many}"
            if len(starts) == 1:
                which = f"A refusal start {forced} does not clearly lower"
            best = f"{each[0]} with the strongest" if len(starts) > 1 else f"{each[0]} with it"
            said.append(f"{which} the unsafe answers of {model}: {rate(asked)} without, {best}")
        elif len(each) > 1:
            said.append(
                f"With any of {len(each)} refusal starts {forced}, {head} to between "
                f"{each[0]} and {each[-1]}"
            )
        else:
            said.append(f"With a refusal start {forced}, {head} to {each[0]}")
    return said


def _apart(lower: Point, upper: Point) -> bool:
    """Whether the intervals say that one is below the other."""
    return lower.high is not None and upper.low is not None and lower.high < upper.low


def _decoding(depth: Depth) -> list[str]:
    pooled: dict[int, list[tuple[float, str]]] = {}
    for model in models(depth, depth.decoding):
        points = of(depth.decoding, model)
        pool = max(points, key=lambda p: p.k)
        point = pool if pool.k > 1 else most(points)
        what = f"to {rate(point)} {prompts(point)} from {model}"
        pooled.setdefault(pool.k, []).append((got(point), what))
    return [
        f"Decoding alone ({f'at least one of {k} settings' if k > 1 else 'the worst setting'}) "
        f"gets unsafe answers {each(said)}"
        for k, said in pooled.items()
    ]


def _gcg(depth: Depth) -> list[str]:
    said, alone = [], []
    for model in models(depth, depth.gcg):
        points = sorted(of(depth.gcg, model), key=lambda p: p.step)
        last, control, asked = points[-1], points[0], plainly(depth, model)
        what = f"to {rate(last)} {prompts(last)} from {model} in {count(last.step, 'steps')}"
        if control.step == 0 and last.step:
            clear = "" if _apart(control, last) else ", not clearly less"
            what += f" ({rate(control)} before the search{clear})"
            if _apart(asked, control) if asked else (control.low or 0) >= HALF:
                what_alone = f"to {rate(control)} {prompts(control)} from {model}"
                alone.append((got(control), what_alone))
        said.append((got(last), what))
    sentences = [f"A suffix searched by gradients (GCG) gets unsafe answers {each(said)}"]
    if alone:
        sentences.append(
            f"{_suffix(depth)} alone, before any search, gets unsafe answers {each(alone)}: the "
            "GCG figure starts from that control"
        )
    return sentences if said else []


def _suffix(depth: Depth) -> str:
    settings = depth.settings.get("gcg")
    text = settings.get("suffix") if isinstance(settings, dict) else None
    if isinstance(text, str) and set(text) == {"!", " "}:
        return f"A suffix of {text.count('!')} exclamation marks"
    return "The initial suffix"


def _finetuning(depth: Depth) -> list[str]:
    kinds = dict.fromkeys([*DATA, *(point.data for point in depth.finetuning)])
    curves = {kind: [p for p in depth.finetuning if p.data == kind] for kind in kinds}
    return [said for kind, points in curves.items() for said in _taught(depth, kind, points)]


def tuned(depth: Depth, model: str, data: str) -> D50 | None:
    """The D50 of fine-tuning on that data."""
    name = "finetuning" if data == "harmful" else f"finetuning:{data}"
    return depth.d50.get(model, {}).get(name)


_OFF, _AT_LAST = ", asked plainly", "; at the end, asked plainly"


def _taught(depth: Depth, data: str, points: list[Finetuning]) -> list[str]:
    """Which models half of the prompts break in, after how much; and how far the others get."""
    broken, others = [], []
    for model in models(depth, points):
        curve = sorted(of(points, model), key=lambda p: p.step)
        first, last, found = curve[0], curve[-1], tuned(depth, model, data)
        rest = ""
        if last.untriggered is not None:
            rest += f"{_OFF} {percent(last.untriggered)}"
        falls = (last.utility_high or 0) < (first.utility_low or 0) and last.step > first.step
        if falls and first.utility is not None and last.utility is not None:
            rest += f", and utility from {_utility(first)} to {_utility(last)}"
        if found and found.value is not None and not found.censored:
            many = examples(found)
            what = f"{d50(found)} {ends(found, [p.step for p in curve])}".rstrip()
            what += f" ({count(many, 'examples')})" if many else ""
            broken.append((found.value, f"{model} after {what}{rest.replace(_OFF, _AT_LAST)}"))
        elif last.step > first.step:
            steps = f"{number(last.step - first.step)} steps"
            what = f"{model} from {rate(first)} to {rate(last)} in {steps}{rest}"
            others.append((got(last), what))
        else:
            what = f"{model} to {rate(last)} after {count(last.step, 'steps')}{rest}"
            others.append((got(last), what))
    taught = f"ine-tuning on {DATA.get(data, data)}"
    said = []
    if broken:
        whose = f"F{taught} breaks half of the prompts"
        said.append(f"{whose} in {each(broken)}")
    if others:
        start = "Of the others, f" if broken else "F"
        said.append(f"{start}{taught} takes the unsafe answers of {each(others)}")
    return said


def _utility(point: Finetuning) -> str:
    return share(point.utility or 0.0, point.utility_low, point.utility_high)


def _first_token(depth: Depth) -> list[str]:
    """Where the first token of harmful examples clearly pulls harder than the later ones."""
    said = []
    for name, points in (("loss", depth.token_loss), ("gradient norm", depth.gradient_norm)):
        pulls = []
        for model in models(depth, points):
            mine = [p for p in of(points, model) if p.data == "harmful" and p.step == 0]
            first = next((p for p in mine if p.position == 0), None)
            late = [p for p in mine if p.position >= FIRST]
            if first and late and all(_apart(p, first) for p in late):
                what = f"{nats(first)}, against at most {nats(most(late))}"
                pulls.append((got(first), f"{model} {what}"))
        if pulls:
            said.append(
                f"Before any fine-tuning, the {name} on harmful examples is clearly greater at the "
                f"first token than at any from position {FIRST} on: {each(pulls)}"
            )
    return said


def _training(depth: Depth) -> list[str]:
    said = []
    for model, run in dict.fromkeys((p.model, p.run) for p in depth.training):
        mine = [p for p in of(depth.training, model) if p.run == run]
        changed = []
        for measure in dict.fromkeys(p.measure for p in mine):
            curve = sorted((p for p in mine if p.measure == measure), key=lambda p: p.step)
            if _apart(curve[0], curve[-1]) or _apart(curve[-1], curve[0]):
                changed.append(f"{measure} went from {rate(curve[0])} to {rate(curve[-1])}")
        what = listed(changed) if changed else "no rate clearly changed"
        until = max(p.step for p in mine)
        said.append(f"In the training run {run} of {model}, up to step {until}: {what}")
    return said


# -- what is missing ----------------------------------------------------------------------------


def missing(depth: Depth) -> list[str]:
    """What was skipped, and why; measures with the same reason share a sentence."""
    reasons: dict[tuple[str, bool], list[str]] = {}
    for measure, why in depth.skipped.items():
        part = measure in MEASURES and bool(getattr(depth, measure))
        reasons.setdefault((why, part), []).append(MEASURES.get(measure, measure))
    said = []
    for (why, part), names in reasons.items():
        because = f" ({stop(why).rstrip('.')})" if why.strip(" .") else ""
        said.append(f"Not measured{' for every model' * part}: {listed(names)}{because}")
    return [visible(stop(sentence)) for sentence in said]
