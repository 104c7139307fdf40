"""How complete a study's results are: the trials that are done, of those that were planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..store import Store


@dataclass(frozen=True)
class Cell:
    """A cell of which trials are missing or failed: numbers of planned and of done trials."""

    model: str
    thinking: str
    dataset: str
    attack: str
    planned: int
    done: int


@dataclass(frozen=True)
class Completeness:
    """Numbers of trials: `planned` by the last run, `done` (with an outcome other than failed),
    `failed`, and `missing` ones that no run has asked yet.

    `limit` is the maximum number of prompts per dataset that the last run was given. `set_aside`
    is the reason, by target, why the last run left trials unasked. `cells` are those with missing
    or failed trials.
    """

    planned: int
    done: int
    failed: int
    missing: int
    limit: int | None
    set_aside: Mapping[str, str]
    cells: tuple[Cell, ...]

    @property
    def complete(self) -> bool:
        """Whether every planned trial is done."""
        return not self.missing and not self.failed

    def to_dict(self) -> dict[str, Any]:
        """The fields, and whether the results are complete, for JSON."""
        return {**asdict(self), "complete": self.complete}

    @property
    def partial(self) -> str:
        """A sentence for results of which trials are missing; "" otherwise."""
        if not self.missing:
            return ""
        return (
            f"Partial results: {self.done:,} of {self.planned:,} planned trials are done, and "
            f"{self.missing:,} were not asked; every rate is of the scored trials of its cell."
        )

    @property
    def aside(self) -> list[str]:
        """A sentence for each target that was set aside."""
        return [
            f"{target} was set aside, since its requests failed in the same way every time: "
            f"{reason.rstrip('.')}."
            for target, reason in self.set_aside.items()
        ]


def describe(store: Store, planned: Mapping[int, int], limit: int | None) -> None:
    """Store what a run plans: numbers of trials by cell id, and its limit of prompts."""
    store.describe("planned", {str(cell): trials for cell, trials in planned.items()})
    store.describe("limit", limit)


def planned(store: Store) -> dict[int, int]:
    """The numbers of trials by cell id that were planned; {} if no run has stored them."""
    return {int(cell): trials for cell, trials in (store.description("planned") or {}).items()}


def completeness(store: Store) -> Completeness | None:
    """How complete the results are; None for a store of an earlier version, which did not record
    what was planned."""
    wanted = planned(store)
    if not wanted:
        return None
    cells, done, failed = [], 0, 0
    for cell, model, thinking, dataset, attack, asked, without in store.query(
        "SELECT c.id, c.model, c.thinking, c.dataset, c.attack, count(t.cell), "
        "total(t.outcome = 'failed') FROM cells c LEFT JOIN trials t ON t.cell = c.id "
        "GROUP BY c.id ORDER BY c.id"
    ):
        if cell not in wanted:
            continue
        wanted[cell] = max(wanted[cell], asked)
        done, failed = done + asked - int(without), failed + int(without)
        if asked - without < wanted[cell]:
            own = (wanted[cell], asked - int(without))
            cells.append(Cell(model, thinking, dataset, attack, *own))
    total = sum(wanted.values())
    return Completeness(
        planned=total,
        done=done,
        failed=failed,
        missing=total - done - failed,
        limit=store.description("limit"),
        set_aside=store.description("set_aside") or {},
        cells=tuple(cells),
    )
