"""Judges: each gives a verdict on a response. Importing a module registers its judges."""

from __future__ import annotations

import inspect
import logging

from ..records import Attempt, Judge, Prompt, Response, Verdict
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
        return Verdict(unsafe=False, refusal=True, score=0.0, text="blocked by the provider")
    try:
        verdict = judge(prompt, attempt, response)
        return await verdict if inspect.isawaitable(verdict) else verdict
    except Exception as error:
        log.debug("judge %s raised:\n%s", name, trace(error))
        sent = (message.content for message in attempt.messages)
        texts = (prompt.text, prompt.context, *sent, response.answer, response.thought)
        message = hide(scrub(f"{type(error).__name__}: {error}"), *texts)
        return Verdict(unsafe=None, error=message, text=f"the judge {name} raised {message}")
