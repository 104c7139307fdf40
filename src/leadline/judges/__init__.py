"""Judges: what is said about a response, by whom."""

from __future__ import annotations

import inspect
import logging

from ..records import Attempt, Judge, Prompt, Response, Verdict

log = logging.getLogger("leadline")


async def ask(
    name: str, judge: Judge, prompt: Prompt, attempt: Attempt, response: Response
) -> Verdict:
    """A judge's verdict, whatever the judge does: one that raises leaves the response unscored.

    What a provider blocked is a refusal, and no judge is asked about it.
    """
    if response.finish == "blocked":
        return Verdict(unsafe=False, refusal=True, score=0.0, text="blocked by the provider")
    try:
        found = judge(prompt, attempt, response)
        return await found if inspect.isawaitable(found) else found
    except Exception as error:
        log.debug("judge %s", name, exc_info=True)
        why = f"{type(error).__name__}: {error}"
        return Verdict(unsafe=None, error=why, text=f"the judge {name} raised {why}")
