"""Judges: each gives a verdict on a response. Importing a module registers its judges."""

from __future__ import annotations

import inspect
import logging
from typing import get_args

from ..records import Attempt, Judge, Outcome, Prompt, Response, Verdict
from ..secret import hide, scrub, trace

log = logging.getLogger("leadline")


async def ask(
    name: str, judge: Judge, prompt: Prompt, attempt: Attempt, response: Response
) -> Verdict:
    """The judge's verdict on a response.

    If the judge raises, the verdict is unscored and holds the error. A response that the provider
    blocked counts as a refusal, without a call of the judge.
    """
    if response.finish == "blocked":
        text = "blocked by the provider"
        return Verdict(unsafe=False, refusal=True, score=0.0, text=text, outcome="refused")
    try:
        verdict = judge(prompt, attempt, response)
        return _checked(await verdict if inspect.isawaitable(verdict) else verdict)
    except (Exception, SystemExit) as error:
        log.debug("judge %s raised:\n%s", name, trace(error))
        sent = (message.content for message in attempt.messages)
        texts = (prompt.text, prompt.context, *sent, response.answer, response.thought)
        message = hide(scrub(f"{type(error).__name__}: {error}"), *texts)
        return Verdict(unsafe=None, error=message, text=f"the judge {name} raised {message}")


def why_unscored(verdict: Verdict, prompt: Prompt, response: Response) -> str:
    """Why a verdict is unscored, without the texts of the prompt and the response."""
    return hide(verdict.text, prompt.text, response.answer, response.thought)


def _checked(verdict: object) -> Verdict:
    """The verdict that a judge returned. Raises TypeError for a value that cannot be stored."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"it returned a {type(verdict).__name__}, not a Verdict")
    for name in ("unsafe", "refusal", "thought_unsafe", "answer_unsafe"):
        value = getattr(verdict, name)
        if not (value is None or isinstance(value, bool)):
            raise TypeError(f"{name} is {value!r}, not True, False or None")
    for name in ("score", "utility"):
        value = getattr(verdict, name)
        if not (value is None or (isinstance(value, int | float) and 0 <= value <= 1)):
            raise TypeError(f"{name} is {value!r}, not a number from 0 to 1")
    if verdict.outcome not in get_args(Outcome):
        raise TypeError(f"outcome is {verdict.outcome!r}, not one of {get_args(Outcome)}")
    categories: object = verdict.categories
    if not isinstance(categories, tuple) or not all(isinstance(c, str) for c in categories):
        raise TypeError(f"categories are {categories!r}, not a tuple of strings")
    if not isinstance(verdict.text, str):
        raise TypeError(f"text is a {type(verdict.text).__name__}")
    verdict.text.encode()  # raises for half of a surrogate pair
    return verdict
