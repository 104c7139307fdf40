"""The dataset and the sampler of RecoveryTrainer: safety and utility rows, mixed in every step.

Which rows an optimizer step holds, and how many tokens of a harmful answer precede each refusal,
depend on the seed and the number of the step alone.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..records import LeadlineError
from .data import Dialogue, Triplet, encode
from .turns import TurnFormat

IGNORED = -100  # the label of tokens that are not part of the loss


class PackedRow(NamedTuple):
    """Token ids of a row, as compact arrays: the context, the harmful answer (empty for utility
    rows) and the answer to learn."""

    context: array[int]
    harmful: array[int]
    answer: array[int]
    safety: bool


class MixtureDataset:
    """A map-style dataset of safety rows, followed by utility rows.

    Its keys are (row, pass), where a pass is one iteration over all rows of a kind. The prefix
    length k is drawn anew for each pass; the same key always gives the same k.
    """

    def __init__(
        self,
        rows: Sequence[Triplet | Dialogue],
        turns: TurnFormat,
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
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, number = key if isinstance(key, tuple) else (key, 0)
        row = self.rows[index]
        k = 0
        if row.safety:
            rng = random.Random(f"{self.seed}/k/{number}/{index}")
            k = prefix_length(rng, len(row.harmful), self.max_prefix)
        context, answer = row.context + row.harmful[:k], row.answer
        return {
            "input_ids": (context + answer).tolist(),
            "labels": [IGNORED] * len(context) + answer.tolist(),
            "safety": row.safety,
        }


def prefix_length(rng: random.Random, length: int, max_prefix: int) -> int:
    """k ~ P_k for a harmful answer of `length` tokens: 0 with probability 1/2, else uniform on
    1..min(max_prefix, length)."""
    limit = min(max_prefix, length)
    return rng.randint(1, limit) if limit and rng.random() < 0.5 else 0


class MixtureSampler:
    """The keys of one epoch of a MixtureDataset, ordered by optimizer step.

    Each step of `size` rows has the same number of safety rows, then utility rows. `share` is the
    share of safety rows, at least one row. The passes over each kind continue across steps and
    epochs. Raises LeadlineError where a step is too small for both kinds.
    """

    def __init__(self, rows: MixtureDataset, size: int, share: float) -> None:
        safety, utility = rows.safety, len(rows) - rows.safety
        if safety and utility and size < 2:
            raise LeadlineError(
                "an optimizer step of one row can't hold both safety and utility rows: raise "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        self.rows, self.size = rows, size
        mixed = min(size - 1, max(1, round(share * size)))
        self.safety = mixed if safety and utility else size if safety else 0
        self.steps = -(-safety // self.safety) if safety else -(-utility // size)

    def __len__(self) -> int:
        return self.steps * self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, rows = self.rows.epoch * self.steps, self.rows
        safety, utility = self.safety, self.size - self.safety
        for step in range(first, first + self.steps):
            for position in range(step * safety, (step + 1) * safety):
                yield self._key("safety", position, 0, rows.safety)
            for position in range(step * utility, (step + 1) * utility):
                yield self._key("utility", position, rows.safety, len(rows) - rows.safety)

    def _key(self, kind: str, position: int, first: int, count: int) -> tuple[int, int]:
        """The key at a position in the endless sequence of shuffled passes over one kind, whose
        `count` rows begin at index `first`."""
        number, place = divmod(position, count)
        return first + _permutation(f"{self.rows.seed}/{kind}/{number}", count)[place], number


@lru_cache(maxsize=4)
def _permutation(seed: str, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def _packed(row: Triplet | Dialogue, turns: TurnFormat, max_length: int | None) -> PackedRow:
    context, harmful, answer = (array("i", ids) for ids in encode(row, turns, max_length))
    return PackedRow(context, harmful, answer, isinstance(row, Triplet))
