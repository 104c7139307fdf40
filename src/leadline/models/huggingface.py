"""The `Model` interface for local weights: any causal language model that transformers loads.

`respond` queues a request and awaits its reply. One worker thread generates batches of queued
requests with equal sampling settings, so the event loop is not blocked. torch is imported by
`prepare`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..records import LeadlineError, NotApplicable, Request, Response
from ..text import one_line
from .checkpoint import check_local, commit, fingerprint, local_path
from .shared_prefix import prefix_groups
from .template import Template, read_template
from .weights import Job, Reply, Weights

_BATCH = 64
_FILL_SECONDS = 0.002  # how long a batch that is not full waits for more requests


class HuggingFaceModel:
    """A folder, GGUF file or hub id as a `Model`. Weights are safetensors or GGUF; code from a hub
    never runs.

    A batch has at most `batch_size` requests and `batch_tokens` tokens (rows x the longest prompt
    and answer), and is halved if it does not fit in memory. Answers do not depend on the other
    requests of the batch: each request is sampled with its own generator, seeded by its seed,
    sample number and prompt. In half precision, rounding can still differ.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str,
        reasoning: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_tokens: int = 32768,
        batch_size: int | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prefix: bool = True,
    ) -> None:
        self.name = name
        self.prefix_way = "continued by local weights" if prefix else ""
        self._batch_tokens, self._batch_size = batch_tokens, batch_size or _BATCH
        # More than one batch, so that a batch can be formed of prompts of similar length.
        self.concurrency = 8 * self._batch_size
        self._path, self._revision = str(path), revision
        self._dtype, self._device = dtype, device
        self._reasoning, self._chat_template = reasoning, chat_template
        self._arguments = dict(chat_template_kwargs or {})
        self._identity: dict[str, Any] | None = None
        self._loaded: tuple[Template, Weights] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: list[Job] = []
        self._batches: asyncio.Task[None] | None = None

    @staticmethod
    def live(
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        revision: str,
        batch_size: int | None = None,
        reasoning: str | None = None,
    ) -> HuggingFaceModel:
        """A model in memory with its tokenizer, such as a model in training.

        `revision` identifies the weights in the keys of the trials: it must change with them. The
        caller puts the model into eval mode. Raises LeadlineError if the tokenizer has no chat
        template.
        """
        instance = HuggingFaceModel(name, name=name, batch_size=batch_size)
        instance._identity = {"name": name, "interface": "live", "revision": revision}
        template = Template.of(tokenizer, name, reasoning=reasoning)
        weights = Weights.of(model)
        weights.stops |= {tokenizer.eos_token_id} - {None}
        instance._loaded = template, weights
        return instance

    @property
    def identity(self) -> Mapping[str, Any]:
        """What identifies the model in the keys of the trials.

        A folder or GGUF file is identified by a hash of its content, so it can be moved; a hub id
        by its commit.
        Raises LeadlineError if there is no model.
        """
        if self._identity is None:
            local = local_path(self._path)
            if local:
                check_local(local)
            template = read_template(self._chat_template) if self._chat_template else ""
            options = {
                "reasoning": self._reasoning,
                "dtype": self._dtype,
                "chat_template": template
                and blake2b(template.encode(), digest_size=16).hexdigest(),
                "chat_template_kwargs": self._arguments,
            }
            self._identity = {
                "model": local.resolve().name if local else self._path,
                "name": self.name,
                "interface": "local",
                "revision": fingerprint(local) if local else commit(self._path, self._revision),
                **{key: value for key, value in options.items() if value},
            }
        return self._identity

    async def prepare(self, *, prefix: bool) -> str:
        """Load the tokenizer and the weights. Returns why response prefixes are not available, or
        "": local weights support them unless the study sets `prefix: none`.

        Raises LeadlineError if the model does not load.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="leadline-generate")
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        return "" if self.prefix_way else f"{self.name}: the study sets prefix: none"

    async def respond(self, request: Request) -> Response:
        """Generate the answer to a request. Errors are returned, not raised: finish is
        "not_applicable" for messages that the chat template rejects, and "error" for a failure.
        `seconds` is the time that the batch took."""
        if self._loaded is None:
            return _failed(f"model {self.name} is not loaded: call prepare() first")
        template, weights = self._loaded
        try:
            prompt = template.render(request)
        except NotApplicable as error:
            return Response("", finish="not_applicable", error=str(error))
        except (LeadlineError, ValueError, TypeError) as error:
            return _failed(f"the prompt cannot be rendered: {one_line(error)}")
        size, max_tokens = len(prompt.ids), request.sampling.max_tokens
        if weights.context is not None:
            max_tokens = min(max_tokens, weights.context - size)
            if max_tokens < 1:
                return _failed(
                    f"prompt of {size} tokens does not fit the model's context of {weights.context}"
                )
        sampling = replace(request.sampling, max_tokens=max_tokens)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(Job(prompt.ids, sampling, request.sample, future))
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run_batches(weights))
        reply: Reply = await future
        thought, answer = template.split(prompt, template.decode(reply.ids))
        return Response(
            answer,
            thought,
            finish=reply.finish,
            error=reply.error,
            prefix=prompt.prefix,
            prompt_tokens=size,
            completion_tokens=reply.tokens,
            seconds=reply.seconds,
        )

    async def close(self) -> None:
        """Release the weights. Requests that are still queued get an error response."""
        self._loaded = None
        if self._batches is not None and not self._batches.done():
            self._batches.cancel()
            await asyncio.gather(self._batches, return_exceptions=True)
        self._fail_all(self._waiting)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
            self._thread = None

    def _load(self) -> None:
        if self._loaded is None:
            content = str(self.identity["revision"])  # first: checks that there is a model
            local = local_path(self._path)
            path, revision = (str(local), None) if local else (self._path, content)
            template = Template.load(
                path,
                reasoning=self._reasoning,
                chat_template=self._chat_template,
                revision=revision,
                arguments=self._arguments,
            )
            weights = Weights.load(path, revision, self._dtype, self._device)
            weights.stops |= {template.tokenizer.eos_token_id} - {None}
            self._loaded = template, weights

    async def _run_batches(self, weights: Weights) -> None:
        """Generate batches until the queue is empty."""
        stopped = threading.Event()
        batch: list[Job] = []
        loop, thread = asyncio.get_running_loop(), self._thread
        try:
            while self._waiting:
                full = len(self._waiting) >= self._batch_size
                await asyncio.sleep(0 if full else _FILL_SECONDS)
                batch = self._next_batch(min(self._batch_tokens, weights.max_batch_tokens))
                if batch:
                    replies = await loop.run_in_executor(
                        thread, weights.answer, batch, stopped.is_set
                    )
                    for job, reply in zip(batch, replies, strict=True):
                        if not job.future.done():
                            job.future.set_result(reply)
        finally:  # whatever ended the loop, no request may wait forever
            stopped.set()
            self._fail_all(batch + self._waiting)

    def _fail_all(self, jobs: list[Job]) -> None:
        self._waiting = []
        for job in jobs:
            if not job.future.done():
                job.future.set_result(Reply(error=f"model {self.name} was closed"))

    def _next_batch(self, batch_tokens: int) -> list[Job]:
        """Remove the next batch from the queue: the request that has waited longest, and requests
        with the same sampling settings. Those that share its prefix, as in a prefill sweep, come
        first, then the other prefix groups by similarity of prompt length."""
        waiting = [job for job in self._waiting if not job.future.done()]  # done: cancelled
        batch: list[Job] = []
        width = 0
        if waiting:
            candidates = [job for job in waiting if job.settings == waiting[0].settings]
            groups = prefix_groups([job.ids for job in candidates])
            first = next(group for group in groups if 0 in group)
            size = len(candidates[first[0]].ids)
            groups.sort(
                key=lambda group: (group is not first, abs(len(candidates[group[0]].ids) - size))
            )
            ordered = [candidates[n] for group in groups for n in group]
            for job in ordered[: self._batch_size]:
                width = max(width, job.width)
                if batch and width * (len(batch) + 1) > batch_tokens:
                    break
                batch.append(job)
        chosen = set(map(id, batch))
        self._waiting = [job for job in waiting if id(job) not in chosen]
        return batch


def _failed(error: str) -> Response:
    return Response("", finish="error", error=error)
