"""Shallow alignment of the untouched model, and its repair, with Leadline's own commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leadline.align.repair import TrainingConfig, deepen, finetune
from prompts import Data, Row, until_sentence, write_jsonl

ANSWER_WORDS = 35
"""Words of a utility answer, at most."""

Listener = Callable[[Any], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: on refusals of forbidden prompts, and on the untouched model's own
    answers to harmless ones.

    `safety` is the share of refusals among the rows of a step, `refusals` the number of rows with
    different refusals for each forbidden prompt. In `deepen`, `loss` and `max_prefix` (the range
    of k) are those of recovery augmentation. `lora` is the rank of adapters, None for all weights.
    """

    steps: int
    lr: float = 2e-5
    batch: int = 12
    warmup: int = 8
    safety: float = 0.5
    refusals: int = 1
    max_prefix: int = 40
    loss: str = "paper"
    lora: int | None = None
    seed: int = 0

    @property
    def training(self) -> TrainingConfig:
        """The trainer's settings."""
        return TrainingConfig(
            lr=self.lr, steps=self.steps, batch=self.batch, warmup=self.warmup, lora=self.lora,
            adam_beta1=0.9, max_length=512, seed=self.seed,
        )  # fmt: skip


ALIGN = Recipe(steps=60)
DEEPEN = Recipe(steps=100, refusals=3)


def align(
    model: str, data: Data, out: Path, recipe: Recipe = ALIGN, listener: Listener | None = None
) -> Path:
    """Fine-tune on direct refusals and utility answers: alignment of the first tokens alone."""
    forbidden = data.select("forbidden", "train")
    utility = _utility(data)
    # Fine-tuning draws from one shuffled file, so that the share is one of its rows.
    others = round(len(forbidden) * (1 - recipe.safety) / recipe.safety)
    rows = [{"prompt": row.prompt, "completion": data.refusal(row)} for row in forbidden]
    rows += [_dialogue(utility[n % len(utility)]) for n in range(others)]
    file = write_jsonl(data.folder / "align.jsonl", rows)
    finetune(model, file, out, training=recipe.training, evaluation=None, listener=listener)
    return out


def repair(
    model: Path, data: Data, out: Path, recipe: Recipe = DEEPEN, listener: Listener | None = None
) -> Path:
    """Recovery augmentation of the aligned model."""
    rows = [
        {"prompt": row.prompt, "harmful": row.target, "refusal": data.refusal(row, seed)}
        for seed in range(recipe.refusals)
        for row in data.select("forbidden", "train")
        if row.target
    ]
    harmful = write_jsonl(data.folder / f"harmful-{recipe.refusals}.jsonl", rows)
    utility = write_jsonl(data.folder / "utility.jsonl", map(_dialogue, _utility(data)))
    deepen(
        model, harmful, utility, out, loss=recipe.loss, alpha=recipe.safety,
        max_prefix=recipe.max_prefix, training=recipe.training, evaluation=None, listener=listener,
    )  # fmt: skip
    return out


def _utility(data: Data) -> list[Row]:
    """The harmless prompts to train on that have an answer of at least one complete sentence."""
    return [row for row in data.select("harmless", "train") if _answer(row)]


def _answer(row: Row) -> str:
    """The answer, shortened to its first sentences where it is long or was truncated: short rows
    make fast steps."""
    words = row.target.split(" ")
    if row.complete and len(words) <= ANSWER_WORDS:
        return row.target.strip()
    return until_sentence(" ".join(words[:ANSWER_WORDS]))


def _dialogue(row: Row) -> dict[str, Any]:
    return {"prompt": row.prompt, "completion": _answer(row)}
