"""An OpenAI-compatible endpoint: /v1/chat/completions or /v1/completions.

Over chat, a response prefix is a final assistant message that the server is asked to continue;
servers differ in how, and many start a new turn without a word, so each way is probed. Over
completions the prompt is rendered here, and a prefix is simply its end.
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
from . import reasoning
from ._exchange import BLOCKED, Exchange, Fault, Reply
from .spec import Limits, ModelSpec

if TYPE_CHECKING:
    from .template import Rendered, Template

# Ways to hand over a response prefix in a chat request: (fields of the body, of the message).
_WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "continue_final_message": (
        {"add_generation_prompt": False, "continue_final_message": True},
        {},
    ),
    "prefix_flag": ({}, {"prefix": True}),
    "final_message": ({}, {}),
}
_FINDINGS = {
    "continues": "a probe shows that it continues",
    "echoes": "a probe shows that it continues, repeating the prefix",
    "unknown": "whether it continues could not be verified",
}


class Endpoint:
    """A Model behind HTTP. See `Model` in records.py for what its methods promise."""

    def __init__(self, spec: ModelSpec, limits: Limits) -> None:
        self.spec = spec
        self.name = spec.label
        self.concurrency = spec.concurrency or limits.concurrency
        self.prefix_way = ""  # how a response prefix reaches the model, in words for the report
        path = "chat/completions" if spec.interface == "chat" else "completions"
        self.exchange = Exchange(spec, limits, f"{spec.url}/{path}")
        self._template: Template | None = None
        card = spec.described if spec.interface == "chat" else None  # else the template tells
        self._reasoning = spec.reasoning or (card.format if card else None)
        self._format = reasoning.get(self._reasoning or "none")
        self._way = ""
        self._echoes = False
        self._as_text = False  # whether /v1/completions wants the prompt as text

    @property
    def identity(self) -> Mapping[str, Any]:
        told = ("model", "revision", "interface", "chat_template", "tokenizer", "prefix",
                "extra_body")  # fmt: skip
        fields = {field: getattr(self.spec, field) for field in told}
        return {"name": self.name, "reasoning": self._reasoning, **fields}

    # -- before the first trial -----------------------------------------------------------------

    async def prepare(self, *, prefix: bool) -> str:
        await self.exchange.open()
        if self.spec.interface == "completions" or self.spec.tokenizer:
            await self._load_template()
        if self.spec.prefix == "none":
            return self._no_prefix("the study says prefix: none for it")
        if self.spec.interface == "completions":
            self.prefix_way = "rendered with the chat template and sent to /v1/completions"
            return ""
        return await self._find_way() if prefix else ""

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
                f"{self.name}: {error} (the tokenizer is needed to render prompts; name its "
                "folder or hub id under tokenizer:)"
            ) from None
        except ImportError:
            raise LeadlineError(
                f"{self.name}: rendering prompts needs transformers: pip install 'leadline[local]'"
            ) from None

    async def _find_way(self) -> str:
        """Find how this server continues a response prefix: each way is tried and its effect
        looked at, since servers drop what they do not know or start a new turn after it."""
        ways = list(_WAYS) if self.spec.prefix == "auto" else [self.spec.prefix]
        found: dict[str, str] = {}
        for way in ways:
            found[way] = await self._probe(way)
            if found[way] == "continues":
                break
        for wanted in _FINDINGS:
            for way, finding in found.items():
                if finding == wanted:
                    self._way, self._echoes = way, finding == "echoes"
                    unit = "tokens" if self._template else "words"
                    self.prefix_way = (
                        f"{way.replace('_', ' ')} ({_FINDINGS[finding]}; k counts {unit})"
                    )
                    return ""
        tried = "; ".join(f"{way.replace('_', ' ')}: {finding}" for way, finding in found.items())
        return self._no_prefix(f"the server does not continue a response prefix ({tried})")

    def _no_prefix(self, why: str) -> str:
        return f"{self.name} takes no response prefix: {why}"

    async def _probe(self, way: str) -> str:
        """What a server makes of a prefix: continues, echoes, ignores it, or starts a new turn.

        By what is said: a list to repeat, begun with a slip that no fresh start would make. By
        what is counted: prompt tokens against those without a prefix and with a longer one."""
        ask = (Message("user", "Repeat this list exactly, with commas: amber, birch, cedar, "
                               "dune, ember, flint, grove, heron"),)  # fmt: skip
        once, twice = "amber, birch, zedar, dune,", "amber, birch, zedar, dune, " * 2
        prefixes = (None, ResponsePrefix(once), ResponsePrefix(twice.strip()))
        bodies = [
            self._chat_body(Request(ask, prefix, Sampling(max_tokens=12)), way)
            for prefix in prefixes
        ]
        plain, short, long = [await self.exchange.probe(body) for body in bodies]
        if isinstance(short, Fault):
            return f"HTTP {short.status}" if short.status else short.reason
        if isinstance(plain, Fault) or isinstance(long, Fault):
            return "unknown"
        said = re.sub(r"\s+", " ", short.text).strip().lower()
        if said.startswith(once.rstrip(",")):
            return "echoes"
        if said.startswith("ember"):
            return "continues"
        if min(plain.prompt_tokens, short.prompt_tokens, long.prompt_tokens) <= 0:
            return "ignored" if said and short.text == plain.text else "unknown"
        grown = short.prompt_tokens - plain.prompt_tokens
        step = long.prompt_tokens - short.prompt_tokens
        if grown <= 0 or step <= 0:
            return "ignored"
        # A new turn adds the marks between turns to the prefix's own tokens.
        return "continues" if grown - step < 2 else "a new turn after it"

    # -- one trial ------------------------------------------------------------------------------

    async def respond(self, request: Request) -> Response:
        started = time.monotonic()
        rendered: Rendered | None = None
        given = ""
        try:
            if self._template and self.spec.interface == "completions":
                rendered = self._template.render(request)
                body = self._completion_body(request, rendered)
            else:
                if request.prefix:
                    request = self._cut(request, request.prefix)
                    given = self._prefix_text(request.prefix or ResponsePrefix())
                body = self._chat_body(request, self._way)
        except NotApplicable as why:
            return Response("", finish="not_applicable", error=str(why))

        sent_text = self._as_text

        def as_text(fault: Fault) -> bytes | None:
            """A server that refuses token ids before it ever answered gets text instead."""
            nonlocal sent_text
            if rendered is None or sent_text or fault.status not in (400, 422):
                return None
            if self.exchange.ever_answered and not self._as_text:
                return None
            self._as_text = sent_text = True
            return self._completion_body(request, rendered)

        reply = await self.exchange.ask(body, as_text)
        seconds = time.monotonic() - started
        if isinstance(reply, Fault):
            finish = "blocked" if reply.code in BLOCKED else "error"
            return Response("", finish=finish, error=reply.reason, seconds=seconds)  # type: ignore[arg-type]
        if rendered and self._template:
            thought, answer = self._template.split(rendered, reply.text)
            given = rendered.prefix
        else:
            thought, answer = self._split_chat(reply, given)
        counts = (reply.prompt_tokens, reply.completion_tokens, seconds)
        return Response(answer, thought, reply.finish, "", given, *counts)

    def _cut(self, request: Request, prefix: ResponsePrefix) -> Request:
        """The prefix kept to its tokens: by the tokenizer if there is one, else by words."""
        if (prefix.thought or prefix.thought_open) and self._format.name != "none":
            raise NotApplicable(
                f"{self.name}: chat templates rewrite a thought in a response prefix: use "
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
        """A chat template writes the empty thought before an answer itself, and many refuse one
        that is written already."""
        return prefix.answer if self._format.ends else reasoning.render(self._format, prefix)

    def _chat_body(self, request: Request, way: str) -> bytes:
        messages: list[dict[str, Any]] = [
            {"role": m.role, "content": m.content} for m in request.messages
        ]
        body = self._body(request)
        body["messages"] = messages
        if request.prefix and way:
            fields, marks = _WAYS[way]
            text = self._prefix_text(request.prefix)
            messages.append({"role": "assistant", "content": text, **marks})
            body |= fields
        if request.thinking != "default":
            switch = self._format.switch(request.thinking)
            if "reasoning_effort" in switch:
                body["reasoning_effort"] = switch["reasoning_effort"]
            if "thinking_budget" in switch:  # vLLM's own field, beside the template's
                body["thinking_token_budget"] = switch["thinking_budget"]
            body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), **switch}
        return orjson.dumps(body)

    def _completion_body(self, request: Request, rendered: Rendered) -> bytes:
        prompt: Any = rendered.text if self._as_text else rendered.ids
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
        if self.spec.extra_body:  # null removes a field
            body |= self.spec.extra_body
            body = {k: v for k, v in body.items() if v is not None}
        return body

    def _split_chat(self, reply: Reply, given: str) -> tuple[str, str]:
        """(thought, answer), from the server's own field or from the text."""
        text = reply.text
        if given and self._echoes and text.startswith(given):
            text = text[len(given) :]
        if reply.thought:
            return reply.thought, text
        format = self._format
        if format.name == "none":
            if "</think>" not in text:
                return "", text
            format = reasoning.get("think")
        if given:
            given = reasoning.render(format, ResponsePrefix(given))
        elif reply.finish != "length":  # a whole reply without a mark is an answer: the server
            format = replace(format, opened=False)  # keeps the thought to itself
        return reasoning.split(format, "", given, text)

    async def close(self) -> None:
        await self.exchange.close()
