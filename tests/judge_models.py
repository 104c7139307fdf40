"""Scripted judge models for tests, with valid and invalid replies."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from leadline.records import Attempt, Judge, Prompt, Request, Response, ResponsePrefix, Verdict


@dataclass
class Guard:
    """A Model whose `reply` maps the text to judge to the reply; `asked` records the requests."""

    reply: Callable[[str], str | Response]
    asked: list[Request] = field(default_factory=list)
    name: str = "guard"
    concurrency: int = 4
    identity: dict[str, str] = field(default_factory=dict)

    async def prepare(self, *, prefix: bool) -> str:
        return ""

    async def respond(self, request: Request) -> Response:
        self.asked.append(request)
        await asyncio.sleep(0)
        reply = self.reply(request.messages[-1].content)
        return Response(reply) if isinstance(reply, str) else reply

    async def close(self) -> None: ...


def replying(reply: str | Response) -> Guard:
    """A judge model that always gives this reply."""
    return Guard(lambda text: reply)


def by_text(**replies: str) -> Guard:
    """A judge model that chooses its reply by the first word of the text to judge."""
    return Guard(lambda text: replies[text.split()[0]])


def judge_with(
    judge: Judge, prompt: Prompt, response: Response, prefix: ResponsePrefix | None = None
) -> Verdict:
    """The judge's verdict on a response to an attacked prompt."""

    async def call() -> Verdict:
        attempt = Attempt.ask("as an attack words it", prefix=prefix)
        verdict = judge(prompt, attempt, response)
        return await verdict if inspect.isawaitable(verdict) else verdict

    return asyncio.run(call())
