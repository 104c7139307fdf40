"""An OpenAI-compatible HTTP server for tests, run in a thread, with injected faults."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

REFUSAL = "I'm sorry, but I can't help with that request."


class Server:
    """Answers /v1/chat/completions and /v1/completions.

    `answer(prompt text, body)` returns the text of a reply. `faults` maps a kind of fault (an HTTP
    status, "reset", "garbage", "half", "hang", "empty", or the bytes to send before the connection
    is closed) to its probability per request; `sticky` maps a substring of a prompt to the fault
    that it always gets. `asked` counts successful answers by prompt text, `seen` all requests,
    `listed` those to /v1/models; `bodies` and `headers` are those of the last requests. `inside` is
    the number of requests in progress, `peak` its maximum.
    """

    def __init__(self, answer: Callable[[str, Any], str] = lambda text, body: REFUSAL) -> None:
        self.answer = answer
        self.faults: dict[Any, float] = {}
        self.sticky: dict[str, Any] = {}
        self.reply: Callable[[Any], Any] | None = None  # the whole reply, instead of `answer`
        self.refuse: Callable[[Any], bool] = lambda body: False  # True: status `refuse_status`
        self.refuse_status = 400
        self.delay = 0.0
        self.retry_after: str | None = None
        self.most = 10_000  # concurrent requests above which the status is 429
        self.asked: Counter[str] = Counter()
        self.seen = self.listed = 0
        self.models = b""  # what /v1/models sends, if not a list of models
        self.inside = self.peak = 0
        self.bodies: list[Any] = []
        self.headers: list[Any] = []
        self.error_body: Any = {"error": {"message": "injected"}}
        self._random = random.Random(7)

    @property
    def url(self) -> str:
        """The base URL of the API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        started = threading.Event()

        async def serve() -> None:
            app = web.Application(client_max_size=2**26)
            app.router.add_post("/v1/chat/completions", self._handle)
            app.router.add_post("/v1/completions", self._handle)
            app.router.add_get("/v1/models", self._models)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", getattr(self, "port", 0))
            await site.start()
            self.port: int = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            started.set()
            await self._stop.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.listed += 1
        if self.models:
            return self._fault(request, self.models)
        return web.json_response({"data": [{"id": "test"}]})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text())
        self.seen += 1
        self.bodies = [*self.bodies[-200:], body]
        self.headers = [*self.headers[-20:], dict(request.headers)]
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            if self.inside > self.most:
                return self._fault(request, 429)
            if self.delay:
                await asyncio.sleep(self.delay)
            return await self._answer(request, body)
        finally:
            self.inside -= 1

    async def _answer(self, request: web.Request, body: Any) -> web.StreamResponse:
        chat = "messages" in body
        users = [m["content"] for m in body["messages"] if m["role"] == "user"] if chat else []
        text = users[-1] if chat else str(body["prompt"])
        kind = next((k for part, k in self.sticky.items() if part in text), None)
        if kind is None:
            draw = self._random.random()
            for k, share in self.faults.items():
                if draw < share:
                    kind = k
                    break
                draw -= share
        if kind == "hang":
            await asyncio.sleep(3)
        if kind is None and self.refuse(body):
            kind = self.refuse_status
        if kind is not None:
            return self._fault(request, kind)
        self.asked[text] += 1
        if self.reply:
            return web.json_response(self.reply(body))
        reply = self.answer(text, body)
        choice = (
            {"message": {"role": "assistant", "content": reply}} if chat else {"text": reply}
        ) | {"index": 0, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(text.split()), "completion_tokens": len(reply.split())}
        return web.json_response({"choices": [choice], "usage": usage})

    def _fault(self, request: web.Request, kind: Any) -> web.StreamResponse:
        if isinstance(kind, bytes):
            assert request.transport
            request.transport.write(kind)
            request.transport.close()
            return web.Response()
        if kind == "reset":
            assert request.transport
            request.transport.abort()
            return web.Response()
        if kind == "garbage":
            return web.Response(text="<html>gateway</html>", content_type="application/json")
        if kind == "half":
            return web.Response(text='{"choices": [{"message": {"con', status=200)
        if kind == "empty":
            return web.json_response({"choices": []})
        headers = {"Retry-After": self.retry_after} if self.retry_after and kind == 429 else {}
        return web.json_response(self.error_body, status=int(kind), headers=headers)
