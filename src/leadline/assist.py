"""Calls of models other than the target (judges' and attackers'), cached in the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import orjson

from . import plan
from .records import (
    Attempt,
    AttemptFailed,
    Finish,
    Message,
    Model,
    NotApplicable,
    Request,
    Response,
    Sampling,
    Verdict,
)
from .secret import hide, scrub, trace
from .store import Store

log = logging.getLogger("leadline")


async def respond(model: Model, request: Request) -> Response:
    """The model's response. An error response if the model raises or returns something else."""
    try:
        return _checked(await model.respond(request))
    except (Exception, SystemExit) as error:
        log.debug("model %s raised:\n%s", model.name, trace(error))
        sent = (message.content for message in request.messages)
        reason = hide(scrub(f"{type(error).__name__}: {error}"), *sent)
        return Response("", finish="error", error=reason)


def _checked(response: Response) -> Response:
    """The response with token counts that the store accepts. Raises TypeError or ValueError for one
    that is no response, so that a model that is a plug-in cannot stop the others."""
    if not isinstance(response, Response):
        raise TypeError(f"the model returned {type(response).__name__}, not a Response")
    texts = (response.answer, response.thought, response.error, response.prefix)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("the model returned a Response whose texts are not all strings")
    for text in texts:
        text.encode()  # raises UnicodeEncodeError for lone surrogates, which SQLite rejects
    if response.finish not in get_args(Finish):
        raise ValueError(f"unknown finish reason {response.finish!r}")
    return replace(
        response,
        prompt_tokens=_count(response.prompt_tokens),
        completion_tokens=_count(response.completion_tokens),
    )


def _count(value: object) -> int:
    """A token count; 0 if it is not a non-negative integer that SQLite can store."""
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0


def store_response(store: Store, key: bytes, request: Request, response: Response) -> None:
    """Store a response unless it failed, so that failed requests are sent again by the next run."""
    if response.finish not in ("error", "not_applicable"):
        store.put_response(key, orjson.dumps(request).decode(), response)


class CachedModel:
    """A Model that caches the responses of another one in the store. Equal requests that are made
    at the same time are sent once. `on_failure` is called with the reason of each failed request.
    """

    def __init__(
        self, model: Model, store: Store, on_failure: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.model, self.store, self._on_failure = model, store, on_failure
        self.name, self.concurrency = model.name, model.concurrency
        self.identity: Mapping[str, Any] = model.identity
        self._in_flight: dict[bytes, asyncio.Future[Response]] = {}

    async def prepare(self, *, prefix: bool) -> str:
        """See `Model.prepare`."""
        return await self.model.prepare(prefix=prefix)

    async def respond(self, request: Request) -> Response:
        """The stored response to this request, or the model's."""
        key = plan.model_key(self.identity, request)
        if key in self._in_flight:
            return await self._in_flight[key]
        if cached := self.store.response(key):
            return cached
        self._in_flight[key] = asyncio.get_running_loop().create_future()
        response = Response("", finish="error", error="cancelled")
        try:
            response = await respond(self.model, request)
            store_response(self.store, key, request, response)
            if response.failed:
                self._on_failure(response.error)
        finally:
            self._in_flight.pop(key).set_result(response)
        return response

    async def close(self) -> None:
        """Close the model."""
        await self.model.close()


class Assistance:
    """The `Assist` of one trial (see records.py). `build_request` turns an attempt into a request
    to the target; `judge` is the dataset's first judge."""

    def __init__(
        self,
        attacker: CachedModel | None,
        target: CachedModel,
        build_request: Callable[[Attempt], Request],
        judge: Callable[[Attempt, Response], Awaitable[Verdict]],
    ) -> None:
        self._attacker, self._target = attacker, target
        self._build_request, self._judge = build_request, judge

    async def write(
        self,
        ask: str | Sequence[Message],
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        sample: int = 0,
    ) -> str:
        """See `Assist.write`."""
        if self._attacker is None:
            raise NotApplicable(plan.NO_ATTACKER)
        messages = (Message("user", ask),) if isinstance(ask, str) else tuple(ask)
        sampling = Sampling(temperature, max_tokens=max_tokens, seed=0 if temperature else None)
        response = await self._attacker.respond(Request(messages, None, sampling, sample=sample))
        if response.finish in ("error", "blocked", "not_applicable"):
            raise AttemptFailed(f"the attacker gave no text: {response.error or response.finish}")
        if response.finish == "length":
            raise AttemptFailed(f"the attacker's answer was truncated at {max_tokens} tokens")
        if not response.answer.strip():
            raise AttemptFailed("the attacker's answer is empty")
        return response.answer

    async def target(self, attempt: Attempt) -> Response:
        """See `Assist.target`."""
        return await self._target.respond(self._build_request(attempt))

    async def judge(self, attempt: Attempt, response: Response) -> Verdict:
        """See `Assist.judge`."""
        return await self._judge(attempt, response)
