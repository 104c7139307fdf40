"""Requests to an HTTP endpoint: bounded concurrency, retries, and giving up on a dead endpoint.

aiohttp was chosen by measurement (benchmarks/engine.py): the engine sends many small requests, so
the client's overhead per request limits the throughput.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from ..records import Finish, LeadlineError
from ..secret import hide, keep_secret, scrub
from ..text import visible
from .spec import Limits, ModelSpec

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger("leadline")
_RETRIED = {408, 409, 425, 429}  # and every status from 500
_ENDPOINT_ERRORS = {401, 403, 404, 405}  # about the endpoint, not about one request
_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0  # seconds
_DOWN_SECONDS = 60.0
BLOCKED = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
_NO_QUOTA = "insufficient_quota"  # sent with status 429, but retrying does not help
# Replies above this size (bytes) are read and parsed a few at a time, for each endpoint; the others
# wait in the server's buffers. Else 64 of the largest allowed size would take more than 1 GB.
_LARGE, _LARGE_AT_ONCE = 2**18, 4
# Finish reasons of a reply with an answer. Any other one is a failure.
_FINISH: dict[str, Finish] = {
    "stop": "stop",
    "eos": "stop",  # Together
    "eos_token": "stop",  # TGI
    "stop_sequence": "stop",  # TGI
    "length": "length",
    "model_length": "length",  # Mistral
    "repetition": "length",  # vLLM: generation was ended after repeated tokens
    "content_filter": "blocked",
}
_TOOL_CALL = ("tool_calls", "function_call")
_TRANSIENT = ("error", "abort", "insufficient_system_resource")  # of vLLM, SGLang, DeepSeek


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


class _Place:
    """A place among the large replies that are read at the same time."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places, self.taken = places, False

    async def take(self) -> None:
        """Wait for a place."""
        await self._places.acquire()
        self.taken = True

    def leave(self) -> None:
        """Leave the place, if it was taken."""
        if self.taken:
            self._places.release()


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
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._shortened_wait = False  # whether the log has the warning on Retry-After

    async def open(self) -> None:
        """Open the session and check that the server responds with any status.

        Raises LeadlineError if it does not; retries for a few seconds, since it may be starting.
        """
        import aiohttp

        # Looking up proxies costs time on every request, so do it only if one is configured.
        proxied = any(name.lower().endswith("_proxy") for name in os.environ)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        if key := os.environ.get(self.spec.api_key_env, "").strip():  # files end in a newline
            headers["Authorization"] = f"Bearer {key}"
            keep_secret(key)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self.limits.timeout, sock_connect=10),
            headers=headers,
            auto_decompress=False,  # _read_body decompresses, up to the limit
            trust_env=proxied,
        )
        short = aiohttp.ClientTimeout(total=15)
        for wait in (0.3, 0.7, 1.5, None):
            try:
                async with self._session.get(
                    f"{self.spec.url}/models", timeout=short, allow_redirects=False
                ):
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

    async def send(self, body: bytes) -> Reply | Fault:
        """Send a request; retry transient failures with exponential backoff and full jitter."""
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
        place = _Place(self._large)
        try:
            return await self._send(body, place)
        finally:
            place.leave()

    async def _send(self, body: bytes, place: _Place) -> Reply:
        import aiohttp

        assert self._session
        try:
            # A redirect could lead prompts and answers to another host.
            async with self._session.post(self.url, data=body, allow_redirects=False) as reply:
                if reply.status != 200:
                    raw = await _read_error_body(reply)
                    raise self._status_fault(reply.status, reply.headers, raw, body)
                raw, whole = await _read_body(reply, self.limits.max_reply_bytes, place)
                content_type = reply.headers.get("Content-Type", "none")
        except TimeoutError:
            raise Fault(f"no answer within {self.limits.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(_short(error)) from None
        if not whole:
            most = self.limits.max_reply_mib
            raise Fault(
                f"the reply is larger than {most:g} MiB (max_reply_mib: under limits:)",
                retryable=False, status=200,
            )  # fmt: skip
        try:
            data = orjson.loads(raw)
        except ValueError:
            raise Fault(
                f"the reply is not valid JSON ({len(raw)} bytes, Content-Type: "
                f"{_shown(content_type, 80)})",
                status=200,
            ) from None
        return _read(data, body)

    def _status_fault(
        self, status: int, headers: Mapping[str, str], raw: bytearray, body: bytes
    ) -> Fault:
        """The Fault for a status other than 200, with the server's error message."""
        try:
            data = orjson.loads(raw)
            code, message = _error(data.get("error") or data.get("detail") or data)
        except (ValueError, AttributeError):
            code, message = "", raw[:300].decode("utf-8", "replace")
        if 300 <= status < 400:
            # Without user name, password and query, which may hold secrets.
            where = re.sub(r"(?<=//)[^/]*@|[?#].*", "", headers.get("Location", ""))
            message = (
                f"the server redirects to {where or 'another address'}, and redirects are not "
                "followed: set url: to the final address"
            )
        reason = f"HTTP {status}: {_shown(hide(scrub(message), *_sent_texts(body)))}"
        if status == 401 and not os.environ.get(self.spec.api_key_env):
            reason += f" (set {self.spec.api_key_env} in the environment, or set api_key_env:)"
        if status == 404:
            reason += " (is the model's name right, and does url: end in /v1?)"
        retryable = (status in _RETRIED or status >= 500) and code != _NO_QUOTA
        wait, longest = _retry_after(headers) if retryable else None, self.limits.max_retry_after
        if wait and wait > longest:
            asked = f"Retry-After is {min(wait, 1e6):.0f} s, shortened to {longest:g} s"
            reason, wait = f"{reason} ({asked})", longest
            if not self._shortened_wait:
                self._shortened_wait = True
                log.warning("%s: %s (max_retry_after: under limits:)", self.spec.label, asked)
        return Fault(reason, retryable, wait, status, code)

    def _check_down(self, fault: Fault) -> None:
        """Give up on the endpoint if it rejects every request or has been unreachable for long."""
        redirected = 300 <= fault.status < 400
        if fault.status in _ENDPOINT_ERRORS or redirected or fault.code == _NO_QUOTA:
            self._endpoint_errors += 1
            if self._endpoint_errors >= 3 and (not self.has_succeeded or fault.code == _NO_QUOTA):
                self._down = fault.reason
        elif fault.status == 0:
            self._connection_faults += 1
            silence = time.monotonic() - self._last_success
            if self._connection_faults >= 20 and silence > max(_DOWN_SECONDS, self.limits.timeout):
                self._down = f"the endpoint is down: no reply for {silence:.0f} s ({fault.reason})"


async def _read_body(
    reply: aiohttp.ClientResponse,
    most: int,
    place: _Place | None = None,
) -> tuple[bytearray, bool]:
    """The decompressed body, and whether it is complete: reading stops after `most` bytes, whether
    they are compressed or not. A large body waits for its `place`. Raises Fault for
    one that cannot be decompressed."""
    encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        reason = (
            f"the reply has the Content-Encoding {_shown(encoding, 80)}; only gzip is supported"
        )
        raise Fault(reason, retryable=False, status=200)
    # 47: a window of 32 KiB, and a gzip or zlib header.
    inflate = zlib.decompressobj(wbits=47) if encoding not in ("", "identity") else None
    body, received = bytearray(), 0
    async for chunk in reply.content.iter_any():
        received += len(chunk)
        try:
            body += inflate.decompress(chunk, most + 1 - len(body)) if inflate else chunk
        except zlib.error:
            raise Fault("the reply cannot be decompressed", status=200) from None
        if max(received, len(body)) > most:
            return body[:most], False
        if place and not place.taken and len(body) > _LARGE:
            await place.take()
    if inflate and not inflate.eof:
        raise Fault("the compressed reply is truncated", status=200)
    return body, True


async def _read_error_body(reply: aiohttp.ClientResponse) -> bytearray:
    """The start of the body of an error status; empty if it cannot be decompressed."""
    try:
        return (await _read_body(reply, 2**16))[0]
    except Fault:
        return bytearray()


def _read(data: Any, body: bytes) -> Reply:
    """Parse a chat or completions response. Raises Fault if it has no answer, whose reason repeats
    no text of `body`, the request."""
    if not isinstance(data, dict):
        raise Fault("the reply is not a JSON object", status=200)
    if error := data.get("error"):
        raise _error_fault(error, body)
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Fault("the reply has no choices", status=200)
    try:
        return _read_choice(choices[0], data.get("usage"), body)
    except (KeyError, TypeError, AttributeError):
        raise Fault("the reply has no message with text", status=200) from None


def _read_choice(choice: dict[str, Any], usage: Any, body: bytes) -> Reply:
    """Parse a choice. Raises Fault if it has no answer, built-in errors for a wrong structure."""
    if error := choice.get("error"):
        raise _error_fault(error, body)
    finish = choice.get("finish_reason") or ""
    if finish in _TRANSIENT:
        raise Fault(f"the server ended the reply with finish_reason {finish}", status=200)
    thought, called = "", finish in _TOOL_CALL
    if "message" in choice:
        message = choice["message"]
        thought = message.get("reasoning") or message.get("reasoning_content") or ""
        called = called or any(message.get(field) for field in _TOOL_CALL)
        # A reply may omit the content if something else is in its place.
        text = message.get("content") if called or thought else message["content"]
        if text is None:
            text = message.get("refusal") or ""
    else:
        text = choice["text"]
    if not isinstance(text, str) or not isinstance(thought, str):
        raise TypeError
    if called and not text.strip():
        raise Fault("the model called a tool instead of answering", False, status=200)
    if finish in _TOOL_CALL or (not finish and text.strip()):
        finish = "stop"
    if not isinstance(finish, str) or finish not in _FINISH:
        reason = f"unknown finish_reason {_shown(finish, 80)!r}" if finish else "no finish_reason"
        raise Fault(f"the reply has {reason}", retryable=not finish, status=200)
    counts = usage if isinstance(usage, dict) else {}
    tokens = (_count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens")))
    return Reply(scrub(text), scrub(thought), _FINISH[finish], *tokens)


def _count(value: Any) -> int:
    """A token count; 0 if it is not a non-negative integer that SQLite can store."""
    return value if type(value) is int and 0 <= value < 2**63 else 0


def _error(detail: Any) -> tuple[str, str]:
    """The code (if it is one that this module handles) and the message of an error object."""
    if not isinstance(detail, dict):
        return "", str(detail)
    inner = detail.get("innererror")
    codes = [detail.get("code"), detail.get("type")]
    codes += [inner.get("code")] if isinstance(inner, dict) else []
    known = (c for c in codes if isinstance(c, str) and (c in BLOCKED or c == _NO_QUOTA))
    return next(known, ""), str(detail.get("message") or detail)


def _error_fault(error: Any, body: bytes) -> Fault:
    """The Fault for an error object in a reply of status 200. Its `code` may be an HTTP status."""
    code, message = _error(error)
    status = error.get("code") if isinstance(error, dict) else None
    permanent = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED
    reason = f"the reply is an error: {_shown(hide(scrub(message), *_sent_texts(body)))}"
    return Fault(reason, not (code or permanent), status=200, code=code)


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
    return max(0.0, seconds) if seconds == seconds else None


def _short(error: BaseException) -> str:
    return _shown(scrub(str(error)), 200) or type(error).__name__


def _shown(text: object, most: int = 300) -> str:
    """Text of a server as one line, without control characters."""
    return visible(" ".join(str(text).split()))[:most]
