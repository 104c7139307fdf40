"""The name `auto`: the best judge that the user has (see `leadline.judge_choice`)."""

from __future__ import annotations

from ..records import Judge, LeadlineError
from ..registry import judge


@judge("auto", source="chosen when the study starts")
def auto() -> Judge:
    """The best judge that you have: an exact one, a configured judge model, or the dataset's own.

    A dataset's own judge is taken if it sees content. Otherwise, in this order: the judge in the
    environment variable LEADLINE_JUDGE, the study's attacker model as `rubric`, the dataset's own
    judge.
    """
    raise LeadlineError("auto stands for a judge of a study: in its place here, name that judge")
