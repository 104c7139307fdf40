"""What RecoveryTrainer draws its batches from: two kinds of rows, mixed step by step.

Everything is a function of the seed and of the optimizer step's number: which rows a step holds,
and how much of a harmful answer stands before each refusal.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..records import LeadlineError
from ._turns import Turns
from .data import Dialogue, Triplet, encode

IGNORED = -100  # a label that no loss counts


class Row(NamedTuple):
    """A row's token ids, packed: before the answer, of a harmful answer, and the answer."""

    context: array[int]
    harmful: array[int]
    answer: array[int]
    safety: bool


class Rows:
    """Safety rows, then utility rows. Asked for (row, round), where a round is one pass over the
    rows of a kind, it draws k anew; the same round draws the same k."""

    def __init__(
        self,
        rows: Sequence[Triplet | Dialogue],
        turns: Turns,
        *,
        max_length: int | None,
        max_prefix: int,
        seed: int,
    ) -> None:
        self.rows = [_packed(row, turns, max_length) for row in rows]
        self.max_prefix, self.seed = max_prefix, seed
        self.safety = sum(row.safety for row in self.rows)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        at, round = key if isinstance(key, tuple) else (key, 0)
        row = self.rows[at]
        k = 0
        if row.safety:
            rng = random.Random(f"{self.seed}/k/{round}/{at}")
            k = prefix_length(rng, len(row.harmful), self.max_prefix)
        given, answer = row.context + row.harmful[:k], row.answer
        return {
            "input_ids": (given + answer).tolist(),
            "labels": [IGNORED] * len(given) + answer.tolist(),
            "safety": row.safety,
        }


def prefix_length(rng: random.Random, length: int, most: int) -> int:
    """k ~ P_k for a harmful answer of `length` tokens: 0 half of the time, else uniform on
    1..min(most, length)."""
    most = min(most, length)
    return rng.randint(1, most) if most and rng.random() < 0.5 else 0


class Mixed:
    """The rows of one epoch, optimizer step by optimizer step: so many safety rows, then utility
    rows, each kind from rounds of its own that go on over steps and epochs."""

    def __init__(self, rows: Rows, size: int, share: float) -> None:
        safety, utility = rows.safety, len(rows) - rows.safety
        if safety and utility and size < 2:
            raise LeadlineError(
                "an optimizer step of one row can't hold both kinds: raise "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        self.rows, self.size = rows, size
        drawn = min(size - 1, max(1, round(share * size)))
        self.safety = drawn if safety and utility else size if safety else 0
        self.steps = -(-safety // self.safety) if safety else -(-utility // size)

    def __len__(self) -> int:
        return self.steps * self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, rows = self.rows.epoch * self.steps, self.rows
        safety, utility = self.safety, self.size - self.safety
        for step in range(first, first + self.steps):
            for at in range(step * safety, (step + 1) * safety):
                yield self._drawn("safety", at, 0, rows.safety)
            for at in range(step * utility, (step + 1) * utility):
                yield self._drawn("utility", at, rows.safety, len(rows) - rows.safety)

    def _drawn(self, kind: str, at: int, first: int, many: int) -> tuple[int, int]:
        round, place = divmod(at, many)
        return first + _shuffled(f"{self.rows.seed}/{kind}/{round}", many)[place], round


@lru_cache(maxsize=4)
def _shuffled(seed: str, many: int) -> list[int]:
    return random.Random(seed).sample(range(many), many)


def _packed(row: Triplet | Dialogue, turns: Turns, max_length: int | None) -> Row:
    context, harmful, answer = (array("i", ids) for ids in encode(row, turns, max_length))
    return Row(context, harmful, answer, isinstance(row, Triplet))
