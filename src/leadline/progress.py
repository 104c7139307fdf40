"""How far a piece of work is: what long-running functions report to their listener."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass
class Progress:
    """Counts of trials or steps. `total` and `done` are by target (or by part of the work)."""

    total: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    asked: int = 0
    known: int = 0
    failed: int = 0
    not_applicable: int = 0
    unscored: int = 0
    notes: list[str] = field(default_factory=list)


Listener = Callable[[Progress], None]
"""Called with the current progress, at most about ten times a second."""


class CombinedProgress:
    """The progress of work that has several parts, reported to one listener.

    A part is either a counter (`counter`) or a study whose targets appear as parts (`study`).
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self.progress = Progress()
        self.listener: Listener = listener or (lambda progress: None)

    def update(self, part: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of a part are complete."""
        self.progress.total[part], self.progress.done[part] = total, done
        self.listener(self.progress)

    def counter(self, part: str) -> Callable[[int, int], None]:
        """A callback `(done, total)` that updates this part."""
        return lambda done, total: self.update(part, done, total)

    def study(self, label: Callable[[str], str]) -> Listener:
        """A listener for `engine.run`; `label` maps a target's name to the name of its part."""
        before = replace(self.progress)

        def listen(progress: Progress) -> None:
            for target, total in progress.total.items():
                part = label(target)
                self.progress.total[part] = total
                self.progress.done[part] = progress.done[target]
            self.progress.failed = before.failed + progress.failed
            self.progress.unscored = before.unscored + progress.unscored
            self.listener(self.progress)

        return listen
