"""Calls of models other than the target (judges' and attackers'), cached in the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson

from . import plan
from .records import (
    Attempt,
    AttemptFailed,
    Message,
    Model,
    NotApplicable,
    Request,
    Response,
    Sampling,
    Verdict,
)
from .store import Store

log = logging.getLogger("leadline")


async def respond(model: Model, request: Request) -> Response:
    """The model's response; an exception that the model raises becomes an error response."""
    try:
        response = await model.respond(request)
        if not isinstance(response, Response):
            raise TypeError(f"it returned a {type(response).__name__}, not a Response")
        _check_fields(response)
        return response
    except Exception as error:
        log.debug("model %s", model.name, exc_info=True)
        return Response("", finish="error", error=f"{type(error).__name__}: {error}")


def _check_fields(response: Response) -> None:
    """Raise TypeError or ValueError for a response that cannot be stored: one model must not stop
    the writer of all others."""
    r = response
    for text in (r.answer, r.thought, r.finish, r.error, r.prefix):
        if not isinstance(text, str):
            raise TypeError(f"its response has a {type(text).__name__} where text belongs")
        text.encode()  # raises for half of a surrogate pair
    for number in (r.prompt_tokens, r.completion_tokens, r.seconds):
        if not (isinstance(number, int | float) and abs(number) < 2**63):
            raise TypeError(
                f"its response has a {type(number).__name__} where a number of 64 bits belongs"
            )


def store_response(store: Store, key: bytes, request: Request, response: Response) -> None:
    """Store a response unless it failed, so that failed requests are sent again by the next run."""
    if response.finish not in ("error", "not_applicable"):
        store.put_response(key, orjson.dumps(request).decode(), response)


class CachedModel:
    """A Model that caches the responses of another one in the store. Equal requests that are made
    at the same time are sent once."""

    def __init__(self, model: Model, store: Store) -> None:
        self.model, self.store = model, store
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
