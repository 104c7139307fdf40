"""Budgets of the depth measures: "quick" for a first look, "standard", and "full" for a paper."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..records import LeadlineError
from .finetuning.config import Data
from .gcg.config import GCGConfig


@dataclass(frozen=True)
class Budget:
    """Limits of the measures; None means no limit.

    All measures use at most `prompts` harmful prompts and generate at most `max_tokens` tokens. KL
    is measured along `kl_prompts` target answers of at most `kl_tokens` tokens. `ks` are the
    numbers of prefilled tokens, `decoding` the sweep of the `decoding` attack. GCG searches a
    suffix for each of `gcg_prompts` prompts with the settings `gcg`. Fine-tuning attacks use each
    kind of `data` and evaluate after each of `steps` optimizer steps.
    """

    prompts: int | None
    max_tokens: int
    kl_prompts: int | None
    kl_tokens: int
    ks: tuple[int, ...]
    decoding: str
    gcg_prompts: int
    gcg: GCGConfig
    data: tuple[Data, ...]
    steps: tuple[int, ...]


BUDGETS = {
    "quick": Budget(
        prompts=24,
        max_tokens=72,
        kl_prompts=16,
        kl_tokens=64,
        ks=(1, 2, 5, 10, 20),
        decoding="short",
        gcg_prompts=4,
        gcg=GCGConfig(steps=20, candidates=64, topk=64, judge_every=5, answer_tokens=72),
        data=("harmful",),
        steps=(0, 2, 5, 10, 20),
    ),
    "standard": Budget(
        prompts=100,
        max_tokens=256,
        kl_prompts=100,
        kl_tokens=256,
        ks=(1, 2, 3, 5, 10, 20, 40),
        decoding="short",
        gcg_prompts=10,
        gcg=GCGConfig(steps=100, candidates=256, judge_every=10, answer_tokens=256),
        data=("harmful", "identity", "backdoor", "benign"),
        steps=(0, 2, 5, 10, 20, 40),
    ),
    "full": Budget(
        prompts=None,
        max_tokens=512,
        kl_prompts=None,
        kl_tokens=512,
        ks=(1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100),
        decoding="full",
        gcg_prompts=50,
        gcg=GCGConfig(steps=500, answer_tokens=512),
        data=("harmful", "identity", "backdoor", "benign"),
        steps=(0, 1, 2, 4, 6, 10, 20, 40, 80, 160),
    ),
}

LEAST = Budget(
    prompts=12,
    max_tokens=48,
    kl_prompts=8,
    kl_tokens=32,
    ks=(1, 5, 20),
    decoding="short",
    gcg_prompts=2,
    gcg=GCGConfig(steps=20, candidates=32, judge_every=5, answer_tokens=48),
    data=("harmful",),
    steps=(0, 2, 5, 10),
)
"""The smallest limits whose results say anything about a model."""


def reduced(budget: Budget, level: float, prompts: int) -> Budget:
    """A budget whose work is about `level` times as large (1: unchanged), but at least LEAST.

    `prompts` is the number of harmful prompts of the dataset. Where a measure's work is a product
    of two limits, both are reduced by the same factor.
    """
    if level >= 1:
        return budget

    def fewer(full: int | None, least: int | None, power: float = 0.5) -> int:
        full = prompts if full is None else full
        return max(min(full, least or 1), round(full * float(level**power)))

    gcg = replace(
        budget.gcg,
        steps=fewer(budget.gcg.steps, LEAST.gcg.steps),
        candidates=fewer(budget.gcg.candidates, LEAST.gcg.candidates),
        answer_tokens=fewer(budget.gcg.answer_tokens, LEAST.gcg.answer_tokens),
    )
    ks = budget.ks if level > 0.3 else tuple(k for k in budget.ks if k in LEAST.ks) or budget.ks[:3]
    return replace(
        budget,
        prompts=fewer(budget.prompts, LEAST.prompts),
        max_tokens=fewer(budget.max_tokens, LEAST.max_tokens),
        kl_prompts=fewer(budget.kl_prompts, LEAST.kl_prompts),
        kl_tokens=fewer(budget.kl_tokens, LEAST.kl_tokens),
        ks=ks,
        gcg_prompts=fewer(budget.gcg_prompts, LEAST.gcg_prompts),
        gcg=replace(gcg, judge_every=min(gcg.judge_every, max(1, gcg.steps // 4))),
        data=budget.data[: fewer(len(budget.data), len(LEAST.data), 1)],
        steps=budget.steps[: fewer(len(budget.steps), len(LEAST.steps))],
    )


_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


def parse_time(text: str) -> float | None:
    """Seconds of a budget such as "20min", "2h", "1h30min" or "90s"; None for another text.

    Raises LeadlineError for a time of 0.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|sec|s)", text.strip())
    if not parts or "".join(f"{n}{unit}" for n, unit in parts) != re.sub(r"\s", "", text):
        return None
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds:
        raise LeadlineError(f"budget is {text!r}: give a time above 0, such as 20min")
    return seconds


def duration(seconds: float) -> str:
    """A time in words, rounded: "45 s", "20 min", "2 h 50 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours:,} h {rest} min" if rest and hours < 10 else f"{round(minutes / 60):,} h"
