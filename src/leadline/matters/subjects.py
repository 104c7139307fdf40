"""The models of a study, with the characteristics in their cards and what each did."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..analysis.sums import Measure, Sums, sums
from ..models.cards import Card
from ..store import Store

CHARACTERISTICS = ("family", "size", "architecture", "reasoning", "stage", "distillation")
"""The six intrinsic characteristics of arXiv 2601.03868."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One model in one thinking mode. `cells` are its sums by measure and attack."""

    model: str
    thinking: str
    card: Card | None
    cells: Mapping[Measure, Mapping[str, Sequence[Sums]]]

    @property
    def name(self) -> str:
        """The model, with its thinking mode where that was set."""
        usual = self.thinking in ("", "default")
        return self.model if usual else f"{self.model} (thinking {self.thinking})"

    @cached_property
    def traits(self) -> Mapping[str, str | float | None]:
        """The value of each characteristic; None where the card does not tell.

        `size` is log2 of the parameters in billions; `reasoning` whether it thinks in this mode;
        `stage` "base" or "post-trained"; `distillation` whether it was trained on the outputs of
        another model.
        """
        card = self.card or Card()
        thinks = {None: None, "none": "no", "native": "yes"}.get(card.reasoning, "yes")
        if card.reasoning == "hybrid" and self.thinking == "off":
            thinks = "no"
        trained = None if card.stage is None else "base" if card.stage == "base" else "post-trained"
        distilled = "yes" if card.stage == "distilled" or card.teacher else "no"
        return {
            "family": card.family,
            "size": None if card.parameters is None else math.log2(card.parameters),
            "architecture": card.architecture,
            "reasoning": thinks,
            "stage": trained,
            "distillation": None if card.stage is None else distilled,
        }


def subjects(store: Store, judge: str | None = None) -> list[Subject]:
    """The models with at least one scored answer, in the order of the study."""
    cells: dict[tuple[str, str], dict[Measure, dict[str, list[Sums]]]] = {}
    measures: tuple[Measure, ...] = ("unsafe", "refusal", "utility")
    for measure in measures:
        for cell in sums(store, measure, judge):
            if cell.n.any():
                own = cells.setdefault((cell.model, cell.thinking), {})
                own.setdefault(measure, defaultdict(list))[cell.attack].append(cell)
    found = []
    for (model, thinking), own in cells.items():
        card = (store.description(f"model:{model}") or {}).get("card")
        known = {name: value for name, value in (card or {}).items() if name in Card.__slots__}
        found.append(Subject(model, thinking, Card(**known) if card else None, own))
    return found
