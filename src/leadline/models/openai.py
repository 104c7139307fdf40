"""An OpenAI-compatible endpoint: /v1/chat/completions or /v1/completions.

With chat, a response prefix is sent as a final assistant message for the server to continue.
Servers need different request fields for that, and many silently start a new turn instead, so each
method is probed first. With completions, the prompt is rendered here with the chat template and the
prefix is appended to it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from ..records import (
    LeadlineError,
    Message,
    NotApplicable,
    Request,
    Response,
    ResponsePrefix,
    Sampling,
)
from ..secret import hide, without_secrets
from ..text import one_line
from . import reasoning
from ._exchange import BLOCKED, Exchange, Fault, Reply
from .spec import Limits, ModelSpec

if TYPE_CHECKING:
    from .template import Rendered, Template

# Methods to send a response prefix over chat: (fields of the body, fields of the last message).
_PREFIX_METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "continue_final_message": (
        {"add_generation_prompt": False, "continue_final_message": True},
        {},
    ),
    "prefix_flag": ({}, {"prefix": True}),
    "final_message": ({}, {}),
}
# Probe results with which a method is usable, best first, and their text in the report.
_USABLE = {
    "continues": "a probe shows that it continues the prefix",
    "echoes": "a probe shows that it continues the prefix and repeats it in the reply",
    "unknown": "a probe could not verify that it continues the prefix",
}


class Endpoint:
    """A Model behind an OpenAI-compatible HTTP endpoint. Implements `Model` of records.py."""

    def __init__(self, spec: ModelSpec, limits: Limits) -> None:
        self.spec = spec
        self.name = spec.label
        self.concurrency = spec.concurrency or limits.concurrency
        self.prefix_way = ""  # how a response prefix is sent, as a phrase for the report
        path = "chat/completions" if spec.interface == "chat" else "completions"
        self.exchange = Exchange(spec, limits, f"{spec.url}/{path}")
        self._template: Template | None = None
        # Over completions, the format is detected from the chat template instead.
        card = spec.described if spec.interface == "chat" else None
        self._reasoning = spec.reasoning or (card.format if card else None)
        self._format = reasoning.get(self._reasoning or "none")
        self._prefix_method = ""  # a key of _PREFIX_METHODS, once a probe has found a usable one
        self._echoes = False  # whether replies repeat the prefix
        self._as_text = False  # whether /v1/completions needs the prompt as text, not token ids
        self._without_bos = False  # whether the server adds BOS to a text itself

    @property
    def identity(self) -> Mapping[str, Any]:
        """What identifies the model in a trial's key."""
        identifying = ("model", "revision", "interface", "chat_template", "tokenizer", "prefix",
                       "extra_body")  # fmt: skip
        fields = {field: getattr(self.spec, field) for field in identifying}
        return {"name": self.name, "reasoning": self._reasoning, **without_secrets(fields)}

    # -- before the first trial -----------------------------------------------------------------

    async def prepare(self, *, prefix: bool) -> str:
        """Connect, load the tokenizer if needed and, with `prefix`, probe for a prefix method.

        Returns why response prefixes are not applicable, or "". Raises LeadlineError if the server
        is unreachable or the tokenizer cannot be loaded.
        """
        await self.exchange.open()
        if self.spec.interface == "completions" or self.spec.tokenizer:
            await self._load_template()
        if self.spec.interface == "completions":
            self.prefix_way = await self._find_prompt_form()
        if self.spec.prefix == "none":
            self.prefix_way = ""
            return self._no_prefix("the study sets prefix: none for it")
        if self.spec.interface == "completions":
            return ""
        return await self._find_prefix_method() if prefix else ""

    async def _load_template(self) -> None:
        from .template import Template

        spec = self.spec
        try:
            self._template = await asyncio.to_thread(
                Template.load, spec.tokenizer or spec.model, reasoning=spec.reasoning,
                chat_template=spec.chat_template,
            )  # fmt: skip
        except LeadlineError as error:
            raise LeadlineError(
                f"{self.name}: {error} (rendering prompts needs a tokenizer: set tokenizer: to "
                "its folder or hub id)"
            ) from error
        except ImportError as error:
            raise LeadlineError(
                f"{self.name}: rendering prompts needs transformers, which cannot be imported "
                f"({one_line(error)}): pip install 'leadline[local]'"
            ) from error

    async def _find_prompt_form(self) -> str:
        """Select token ids or text as the form of prompts, by a probe; returns it as a phrase.

        Token ids are sent unless the server rejects them or counts another number of tokens (a
        proxy may decode them with another tokenizer), and takes the same prompt as text. A server
        that counts one token more in the text adds a BOS of its own, so the template's is left out.
        """
        assert self._template
        request = Request((Message("user", "Say hello."),), None, Sampling(max_tokens=1))
        rendered = self._template.render(request)
        expected = len(rendered.ids)
        way = "rendered with the chat template and sent to /v1/completions"

        async def count(*, as_text: bool, without_bos: bool = False) -> int | None:
            """The server's count of the prompt's tokens, 0 if it does not say, None if it fails."""
            self._as_text, self._without_bos = as_text, without_bos
            reply = await self.exchange.probe(self._completion_body(request, rendered))
            return None if isinstance(reply, Fault) else reply.prompt_tokens

        if await count(as_text=False) in (0, expected):
            return f"{way} as token ids"
        counted = await count(as_text=True)
        if counted is None:  # the fault is not that of the form: the trials show its reason
            self._as_text = False
            return way
        if counted == expected + 1 and await count(as_text=True, without_bos=True) == expected:
            return f"{way} as text"
        self._without_bos = False
        differs = f", in which the server counts {counted} tokens instead of {expected}"
        return f"{way} as text{differs if counted not in (0, expected) else ''}"

    async def _find_prefix_method(self) -> str:
        """Probe the prefix methods and select the best usable one; else return why there is none.

        A status of 200 proves nothing: servers silently drop unknown fields, or start a new turn
        after the prefix.
        """
        methods = list(_PREFIX_METHODS) if self.spec.prefix == "auto" else [self.spec.prefix]
        results: dict[str, str] = {}
        for method in methods:
            results[method] = await self._probe(method)
            if results[method] == "continues":
                break
        for usable, description in _USABLE.items():
            for method, result in results.items():
                if result == usable:
                    self._prefix_method, self._echoes = method, result == "echoes"
                    unit = "tokens" if self._template else "words"
                    self.prefix_way = f"{method.replace('_', ' ')} ({description}; k counts {unit})"
                    return ""
        tried = "; ".join(f"{name.replace('_', ' ')}: {result}" for name, result in results.items())
        return self._no_prefix(f"the server does not continue a response prefix ({tried})")

    def _no_prefix(self, reason: str) -> str:
        return f"{self.name} does not support response prefixes: {reason}"

    async def _probe(self, method: str) -> str:
        """What the server does with a prefix sent by `method`: a key of _USABLE, or a phrase.

        The reply shows it if possible: the model has to repeat a list, and the prefix starts the
        list with a misspelling that a new turn would not make. Otherwise the prompt token counts
        show it: without a prefix, with this one, and with one of twice the length.
        """
        messages = (Message("user", "Repeat this list exactly, with commas: amber, birch, cedar, "
                               "dune, ember, flint, grove, heron"),)  # fmt: skip
        once, twice = "amber, birch, zedar, dune,", "amber, birch, zedar, dune, " * 2
        prefixes = (None, ResponsePrefix(once), ResponsePrefix(twice.strip()))
        bodies = [
            self._chat_body(Request(messages, prefix, Sampling(max_tokens=12)), method)
            for prefix in prefixes
        ]
        plain, short, long = [await self.exchange.probe(body) for body in bodies]
        if isinstance(short, Fault):
            return f"HTTP {short.status}" if short.status else short.reason
        if isinstance(plain, Fault) or isinstance(long, Fault):
            return "unknown"
        text = re.sub(r"\s+", " ", short.text).strip().lower()
        if text.startswith(once.rstrip(",")):
            return "echoes"
        if text.startswith("ember"):
            return "continues"
        if min(plain.prompt_tokens, short.prompt_tokens, long.prompt_tokens) <= 0:
            return "ignored" if text and short.text == plain.text else "unknown"
        first_growth = short.prompt_tokens - plain.prompt_tokens
        second_growth = long.prompt_tokens - short.prompt_tokens
        if first_growth <= 0 or second_growth <= 0:
            return "ignored"
        # A new turn also adds the template's turn delimiters, once.
        return "continues" if first_growth - second_growth < 2 else "a new turn after it"

    # -- one trial ------------------------------------------------------------------------------

    async def respond(self, request: Request) -> Response:
        """Send one request. Never raises for a failure: that is a Response with its `error`."""
        started = time.monotonic()
        rendered: Rendered | None = None
        prefix_text = ""
        try:
            if self._template and self.spec.interface == "completions":
                rendered = self._template.render(request)
                body = self._completion_body(request, rendered)
            else:
                if request.prefix:
                    request = self._truncate_prefix(request, request.prefix)
                    prefix_text = self._prefix_text(request.prefix or ResponsePrefix())
                body = self._chat_body(request, self._prefix_method)
        except NotApplicable as error:
            return Response("", finish="not_applicable", error=str(error))

        reply = await self.exchange.send(body)
        seconds = time.monotonic() - started
        if isinstance(reply, Fault):
            finish = "blocked" if reply.code in BLOCKED else "error"
            sent = (message.content for message in request.messages)
            reason = hide(reply.reason, *sent, prefix_text)
            return Response("", finish=finish, error=reason, seconds=seconds)  # type: ignore[arg-type]
        if rendered and self._template:
            thought, answer = self._template.split(rendered, reply.text)
            prefix_text = rendered.prefix
        else:
            thought, answer = self._split_chat(reply, prefix_text)
        counts = (reply.prompt_tokens, reply.completion_tokens, seconds)
        return Response(answer, thought, reply.finish, "", prefix_text, *counts)

    def _truncate_prefix(self, request: Request, prefix: ResponsePrefix) -> Request:
        """Truncate the prefix to `prefix.tokens` tokens, or to as many words if there is no
        tokenizer. Raises NotApplicable for a prefix with a thought."""
        if (prefix.thought or prefix.thought_open) and self._format.name != "none":
            raise NotApplicable(
                f"{self.name}: chat templates rewrite the thought in a response prefix: set "
                "interface: completions"
            )
        if prefix.tokens is None:
            return request
        if self._template:
            answer = self._template.cut(prefix.answer, prefix.tokens)
        else:
            answer = "".join(re.findall(r"\s*\S+", prefix.answer)[: prefix.tokens])
        return replace(request, prefix=replace(prefix, answer=answer, tokens=None))

    def _prefix_text(self, prefix: ResponsePrefix) -> str:
        """The prefix as message content. For a reasoning model this is only the answer: its chat
        template adds the empty thought, and many templates reject a message that has one."""
        return (
            prefix.answer if self._format.close_pattern else reasoning.render(self._format, prefix)
        )

    def _chat_body(self, request: Request, method: str) -> bytes:
        messages: list[dict[str, Any]] = [
            {"role": m.role, "content": m.content} for m in request.messages
        ]
        body = self._body(request)
        body["messages"] = messages
        if request.prefix and method:
            fields, flags = _PREFIX_METHODS[method]
            text = self._prefix_text(request.prefix)
            messages.append({"role": "assistant", "content": text, **flags})
            body |= fields
        if request.thinking != "default":
            switch = self._format.switch(request.thinking)
            if "reasoning_effort" in switch:
                body["reasoning_effort"] = switch["reasoning_effort"]
            if "thinking_budget" in switch:  # vLLM's request field, in addition to the template's
                body["thinking_token_budget"] = switch["thinking_budget"]
            body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), **switch}
        return orjson.dumps(body)

    def _completion_body(self, request: Request, rendered: Rendered) -> bytes:
        prompt: Any = rendered.ids
        if self._as_text:
            assert self._template
            bos = self._template.tokenizer.bos_token if self._without_bos else None
            prompt = rendered.text.removeprefix(bos or "")
        return orjson.dumps({**self._body(request), "prompt": prompt})

    def _body(self, request: Request) -> dict[str, Any]:
        s = request.sampling
        body: dict[str, Any] = {
            "model": self.spec.model,
            "max_tokens": s.max_tokens,
            "temperature": s.temperature,
        }
        if s.top_p is not None:
            body["top_p"] = s.top_p
        if s.top_k is not None:
            body["top_k"] = s.top_k
        if s.seed is not None:
            body["seed"] = s.seed + request.sample
        if self.spec.extra_body:  # null in extra_body removes a field
            body |= self.spec.extra_body
            body = {k: v for k, v in body.items() if v is not None}
        return body

    def _split_chat(self, reply: Reply, prefix_text: str) -> tuple[str, str]:
        """(thought, answer), from the server's reasoning field or parsed from the text."""
        text = reply.text
        if prefix_text and self._echoes and text.startswith(prefix_text):
            text = text[len(prefix_text) :]
        if reply.thought:
            return reply.thought, text
        format = self._format
        if format.name == "none":
            if "</think>" not in text:
                return "", text
            format = reasoning.get("think")
        if prefix_text:
            prefix_text = reasoning.render(format, ResponsePrefix(prefix_text))
        elif reply.finish != "length":
            # A complete reply without a delimiter is an answer: the server removed the thought.
            format = replace(format, starts_open=False)
        return reasoning.split(format, "", prefix_text, text)

    async def close(self) -> None:
        """Close the HTTP session."""
        await self.exchange.close()
