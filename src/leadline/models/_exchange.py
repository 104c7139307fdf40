"""Requests to an HTTP endpoint: bounded concurrency, retries, and giving up on a dead endpoint.

aiohttp was chosen by measurement (benchmarks/engine.py): the engine sends many small requests, so
the client's overhead per request limits the throughput.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from ..records import Finish, LeadlineError
from ..secret import hide, keep_secret, scrub
from .spec import Limits, ModelSpec

if TYPE_CHECKING:
    import aiohttp

_RETRIED = {408, 409, 425, 429}  # and every status from 500
_ENDPOINT_ERRORS = {401, 403, 404, 405}  # about the endpoint, not about one request
_BACKOFF, _LONGEST_BACKOFF, _LONGEST_RETRY_AFTER = 0.5, 30.0, 600.0  # seconds
_DOWN_SECONDS = 60.0
BLOCKED = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
_NO_QUOTA = "insufficient_quota"  # sent with status 429, but retrying does not help
_FINISH: dict[Any, Finish] = {"length": "length", "content_filter": "blocked"}


class Reply(NamedTuple):
    """The first choice of a response. `thought` is set if the server separates it from `text`."""

    text: str
    thought: str
    finish: Finish
    prompt_tokens: int
    completion_tokens: int


@dataclass(eq=False)
class Fault(Exception):
    """A failed request. `retryable`: a retry may succeed, after `wait` seconds if that is set.
    `status` is the HTTP status, or 0 if the connection failed."""

    reason: str
    retryable: bool = True
    wait: float | None = None
    status: int = 0
    code: str = ""


class Gate:
    """A semaphore with an adaptive limit (additive increase, multiplicative decrease).

    The limit grows by 1 per response until the server first throttles, then by 1 per `limit`
    responses; it halves when the server throttles, at most once a second.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum, self.limit, self.active = maximum, float(min(16, maximum)), 0
        self._slow_start = True
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._last_decrease = -1.0

    async def enter(self) -> None:
        """Wait, first come first served, until a request may be sent."""
        if self.active < self.limit and not self._waiting:
            self.active += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn  # `leave` has already added this request to `active`

    def leave(self, *, throttled: bool) -> None:
        """Record the end of a request, adapt the limit and admit waiting requests."""
        self.active -= 1
        if not throttled:
            growth = 1 if self._slow_start else 1 / self.limit
            self.limit = min(self.maximum, self.limit + growth)
        elif (now := time.monotonic()) - self._last_decrease > 1:
            self.limit = max(1.0, self.limit / 2)
            self._last_decrease, self._slow_start = now, False
        while self._waiting and self.active < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():  # a done future was cancelled
                self.active += 1
                turn.set_result(None)


class Exchange:
    """One endpoint. `send` retries until a request succeeds or a retry cannot help."""

    def __init__(self, spec: ModelSpec, limits: Limits, url: str) -> None:
        self.spec, self.limits, self.url = spec, limits, url
        self.gate = Gate(spec.concurrency or limits.concurrency)
        self.has_succeeded = False  # whether any request has succeeded
        self._session: aiohttp.ClientSession | None = None
        self._down = ""  # why the endpoint was given up on, if it was
        self._pause_until = 0.0
        self._last_success = 0.0
        self._connection_faults = self._endpoint_errors = 0

    async def open(self) -> None:
        """Open the session and check that the server responds with any status.

        Raises LeadlineError if it does not; retries for a few seconds, since it may be starting.
        """
        import aiohttp

        # Looking up proxies costs time on every request, so do it only if one is configured.
        proxied = any(name.lower().endswith("_proxy") for name in os.environ)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.spec.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
            keep_secret(key)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self.limits.timeout, sock_connect=10),
            headers=headers,
            trust_env=proxied,
        )
        short = aiohttp.ClientTimeout(total=15)
        for wait in (0.3, 0.7, 1.5, None):
            try:
                async with self._session.get(f"{self.spec.url}/models", timeout=short):
                    break
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                if wait is None:
                    await self.close()
                    raise LeadlineError(
                        f"{self.spec.label}: nothing answers at {self.spec.url} "
                        f"({_short(error)}): start the server, or correct url: in the study file"
                    ) from None
                await asyncio.sleep(wait)
        self._last_success = time.monotonic()

    async def close(self) -> None:
        """Close the session."""
        if self._session:
            await self._session.close()

    async def send(
        self, body: bytes, revise: Callable[[Fault], bytes | None] = lambda fault: None
    ) -> Reply | Fault:
        """Send a request; retry transient failures with exponential backoff and full jitter.

        After a failure, `revise` may return another body to send at once instead.
        """
        fault, retry = Fault("not sent"), 0
        while True:
            if self._down:
                return Fault(self._down, retryable=False)
            if (pause := self._pause_until - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            await self.gate.enter()
            throttled = False
            try:
                reply = await self._send_once(body)
                self.has_succeeded, self._connection_faults = True, 0
                self._last_success = time.monotonic()
                return reply
            except Fault as error:
                fault, throttled = error, error.retryable and error.status != 500
            finally:
                self.gate.leave(throttled=throttled)
            self._check_down(fault)
            if revised := revise(fault):
                body = revised
                continue
            # A rate limit does not mean that the request is at fault, so allow twice the retries.
            retries = self.limits.retries * (2 if fault.status == 429 else 1)
            if not fault.retryable or retry >= retries:
                tries = f" (tried {retry + 1} times)" if retry else ""
                return replace(fault, reason=fault.reason + tries)
            if fault.wait:
                self._pause_until = max(self._pause_until, time.monotonic() + fault.wait)
            ceiling = min(_LONGEST_BACKOFF, _BACKOFF * 2**retry)
            await asyncio.sleep(random.uniform(0, ceiling))
            retry += 1

    async def probe(self, body: bytes) -> Reply | Fault:
        """Send a request past the concurrency limit, with up to three retries."""
        for wait in (0.5, 1.0, 2.0, None):
            try:
                return await self._send_once(body)
            except Fault as fault:
                if not fault.retryable or wait is None:
                    return fault
                await asyncio.sleep(wait)
        raise AssertionError

    async def _send_once(self, body: bytes) -> Reply:
        """Send one request without retries. Raises Fault."""
        import aiohttp

        assert self._session
        try:
            async with self._session.post(self.url, data=body) as reply:
                raw = await reply.read()
                if reply.status != 200:
                    raise self._status_fault(reply.status, reply.headers, raw, body)
        except TimeoutError:
            raise Fault(f"no answer within {self.limits.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(_short(error)) from None
        try:
            return _read(orjson.loads(raw))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            # Without its text, which may be an answer.
            raise Fault(f"unreadable reply of {len(raw)} bytes", status=200) from None

    def _status_fault(
        self, status: int, headers: Mapping[str, str], raw: bytes, body: bytes
    ) -> Fault:
        """The Fault for a status other than 200, with the server's error message."""
        code, message = "", raw[:2000].decode("utf-8", "replace")
        try:
            detail = orjson.loads(raw)
            detail = detail.get("error") or detail.get("detail") or detail
            if isinstance(detail, dict):
                message = detail.get("message", message)
                inner = detail.get("innererror") or {}
                codes = (detail.get("code"), detail.get("type"), inner.get("code"))
                code = next((c for c in codes if c in BLOCKED or c == _NO_QUOTA), "")
            else:
                message = str(detail)
        except (ValueError, AttributeError, TypeError):
            pass
        message = hide(" ".join(scrub(str(message)).split()), *_sent_texts(body))
        reason = f"HTTP {status}: {message[:300]}"
        if status == 401 and not os.environ.get(self.spec.api_key_env):
            reason += f" (set {self.spec.api_key_env} in the environment, or set api_key_env:)"
        if status == 404:
            reason += " (is the model's name right, and does url: end in /v1?)"
        retryable = (status in _RETRIED or status >= 500) and code != _NO_QUOTA
        return Fault(reason, retryable, _retry_after(headers) if retryable else None, status, code)

    def _check_down(self, fault: Fault) -> None:
        """Give up on the endpoint if it rejects every request or has been unreachable for long."""
        if fault.status in _ENDPOINT_ERRORS or fault.code == _NO_QUOTA:
            self._endpoint_errors += 1
            if self._endpoint_errors >= 3 and (not self.has_succeeded or fault.code == _NO_QUOTA):
                self._down = fault.reason
        elif fault.status == 0:
            self._connection_faults += 1
            silence = time.monotonic() - self._last_success
            if self._connection_faults >= 20 and silence > max(_DOWN_SECONDS, self.limits.timeout):
                self._down = f"the endpoint is down: no reply for {silence:.0f} s ({fault.reason})"


def _read(data: Any) -> Reply:
    """Parse a chat or completions response. Raises built-in errors if its structure is wrong."""
    choice = data["choices"][0]
    thought = ""
    if "message" in choice:
        message = choice["message"]
        text = message["content"]
        if text is None:
            text = message.get("refusal") or ""
        thought = message.get("reasoning") or message.get("reasoning_content") or ""
    else:
        text = choice["text"]
    if not isinstance(text, str) or not isinstance(thought, str):
        raise TypeError
    usage = data.get("usage") or {}
    finish = _FINISH.get(choice.get("finish_reason"), "stop")
    counts = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
    return Reply(scrub(text), scrub(thought), finish, *counts)


def _sent_texts(body: bytes) -> list[str]:
    """The texts of a request, which an error message must not repeat."""
    data = orjson.loads(body)
    texts = [data.get("prompt"), *(message["content"] for message in data.get("messages", ()))]
    return [text for text in texts if isinstance(text, str)]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the Retry-After header (a number or a date); None if absent or invalid."""
    value = headers.get("Retry-After")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER) if seconds == seconds else None


def _short(error: BaseException) -> str:
    text = " ".join(scrub(str(error)).split())
    return text[:200] or type(error).__name__
