"""Budgets of the depth measures: "quick" for a first look, "standard", and "full" for a paper."""

from __future__ import annotations

from dataclasses import dataclass

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
