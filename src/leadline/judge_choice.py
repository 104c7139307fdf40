"""Which judge `auto` stands for: the best one that the user has, and why it was taken."""

from __future__ import annotations

import os
from typing import NamedTuple

from .models.spec import ModelSpec
from .records import LeadlineError
from .study import JudgePick, Study

AUTO = "auto"
VARIABLE = "LEADLINE_JUDGE"
"""The environment variable that holds a judge, as written in a study file."""


class Choice(NamedTuple):
    """A judge and why it was taken."""

    judge: JudgePick
    why: str

    def __str__(self) -> str:
        model = self.judge.spec.label if self.judge.spec else ""
        return f"{self.judge.label}{f' ({model})' if model else ''}: {self.why}"


def choose(own: JudgePick, attacker: ModelSpec | None = None) -> Choice:
    """The judge that `auto` stands for, for a dataset whose own judge is `own`.

    The first of: `own` if it sees content; the judge in the environment variable LEADLINE_JUDGE;
    the judge `rubric` with the study's attacker model; `own`. Raises LeadlineError if the variable
    holds no judge.
    """
    if not own.caution:
        return Choice(own, "the dataset's own judge, which sees content")
    if text := os.environ.get(VARIABLE, "").strip():
        try:
            named = JudgePick.parse(text)
        except LeadlineError as error:
            raise LeadlineError(f"{VARIABLE}: {error}") from None
        if named.name == AUTO:
            raise LeadlineError(f"{VARIABLE}: it must name a judge, not {AUTO}")
        return Choice(named, f"named by {VARIABLE}")
    if attacker:
        options = attacker.model_dump(exclude_defaults=True)
        options.pop("name", None)
        return Choice(JudgePick(name="rubric", options=options), "the study's attacker model")
    return Choice(own, f"no judge model is configured ({VARIABLE} is not set)")


def resolve(picks: list[JudgePick], own: JudgePick, attacker: ModelSpec | None) -> list[JudgePick]:
    """The judges of a dataset, with the choice in the place of `auto`; `own` if there are none."""
    return [choose(own, attacker).judge if p.name == AUTO else p for p in picks] or [own]


def choices(study: Study) -> dict[str, Choice]:
    """What `auto` stands for in a study, by dataset; {} if it does not name `auto`."""
    if all(pick.name != AUTO for pick in study.judges):
        return {}
    return {
        str(pick.options.get("name") or pick.name): choose(pick.judge, study.attacker)
        for pick in study.datasets
    }
