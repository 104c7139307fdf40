"""Progress of long-running functions, which they report to a listener (a progress bar)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass
class Progress:
    """Counts of trials or steps.

    `total` and `done` count them by target (or by part of the work); `done` includes failed ones.
    `asked` is the number of requests sent to targets. `known` is the number of trials that were
    already in the store, `failed` and `not_applicable` the numbers of trials without a response
    and without a request, `unscored` that of trials without the verdict of a judge. `notes` are
    warnings.
    """

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
    """Merges the progress of several parts of a job and reports it to one listener.

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
        """Return a callback `(done, total)` that updates this part."""
        return lambda done, total: self.update(part, done, total)

    def study(self, label: Callable[[str], str]) -> Listener:
        """Return a listener for `engine.run`; `label` maps a target's name to its part's name."""
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
