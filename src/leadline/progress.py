"""Progress of long-running functions, which they report to a listener (a progress bar)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

SAME = 8
"""The number of trials that have to fail in a row, for the same reason, before a target that has
not answered any trial is set aside."""
_ID = re.compile(r"\b(?=[\w-]*\d)[\w-]{8,}\b")  # request ids, times
_MOST_REASONS = 20


@dataclass
class Failures:
    """The failures of a target: `reasons` are the numbers of failed trials by reason, `left` is the
    number of trials that were left unasked, since the target failed `SAME` times in the same way.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    left: int = 0
    reason: str = ""  # of the last failure
    row: int = 0  # failures in a row with that reason
    attacks: set[str] = field(default_factory=set)  # those that failed with that reason
    answered: bool = False  # whether any request was answered

    def count(self, reason: str) -> None:
        """Count a failed trial. Rare reasons are counted together."""
        known = reason in self.reasons or len(self.reasons) < _MOST_REASONS
        self.reasons[reason if known else "other reasons"] += 1

    def note(self, attack: str, reason: str) -> None:
        """Note the result of a request: the reason of its failure, or "" for an answer."""
        if not reason:
            self.answered, self.row = True, 0
            return
        if _ID.sub("", reason) != _ID.sub("", self.reason):
            self.row, self.attacks = 0, set()
        self.reason, self.row = reason, self.row + 1
        self.attacks.add(attack)

    def set_aside(self, attack: str) -> bool:
        """Whether to leave trials of an attack unasked. Where every failure is one of a single
        attack, the trials of others are still asked."""
        always = not self.answered and self.row >= SAME
        return always and (attack in self.attacks or len(self.attacks) > 1)

    def text(self) -> str:
        """The failures in words: `12 failed: HTTP 500: overloaded`; "" for none."""
        if not self.reasons:
            return ""
        ((reason, _),) = self.reasons.most_common(1)
        others = len(self.reasons) - 1
        more = f" (and {others} other reason{'s' * (others > 1)})" if others else ""
        return f"{self.reasons.total():,} failed: {reason}{more}"


@dataclass
class Progress:
    """Counts of trials or steps.

    `total` and `done` count them by target (or by part of the work); `done` includes failed ones,
    which `failures` counts by target and reason. `asked` is the number of requests sent to targets.
    `known` is the number of trials that were already in the store, `failed` and `not_applicable`
    the numbers of trials without a response and without a request, `unscored` that of trials
    without the verdict of a judge. `notes` are warnings.
    """

    total: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    asked: int = 0
    known: int = 0
    failed: int = 0
    not_applicable: int = 0
    unscored: int = 0
    failures: dict[str, Failures] = field(default_factory=dict)
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
                if target in progress.failures:
                    self.progress.failures[part] = progress.failures[target]
            self.progress.failed = before.failed + progress.failed
            self.progress.unscored = before.unscored + progress.unscored
            self.listener(self.progress)

        return listen
