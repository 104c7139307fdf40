"""Local weights: any causal language model that transformers loads, asked in batches.

`respond` puts a request into a queue and awaits; one worker thread generates batch after batch
of waiting requests that are alike, and the event loop stays live. torch is imported by `prepare`.
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
from .checkpoint import check_folder, commit, fingerprint, folder
from .shared_prefix import prefix_groups
from .template import Template, read_template
from .weights import Job, Reply, Weights

_BATCH = 64
_MOMENT = 0.002  # seconds that a batch which is not full waits for the engine to hand over more


class HuggingFaceModel:
    """A folder or hub id as a `Model`. Weights are safetensors, code from a hub never runs.

    A batch holds at most `batch_size` requests and `batch_tokens` tokens (rows x the longest
    prompt and answer); where memory does not bear it, it is halved. Greedy answers do not depend
    on what else is in the batch, nor do sampled ones: each request draws from a generator of its
    own, seeded by its seed, sample and prompt (in half precision, rounding can still differ).
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
        self.concurrency = 8 * self._batch_size  # so that there are like lengths to choose from
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
        """Weights in memory, such as a model in training, with their tokenizer.

        `revision` stands for their content in the trials' keys: it must change with the weights.
        The caller puts the model into eval mode. Raises LeadlineError without a chat template.
        """
        made = HuggingFaceModel(name, name=name, batch_size=batch_size)
        made._identity = {"name": name, "interface": "live", "revision": revision}
        template = Template.of(tokenizer, name, reasoning=reasoning)
        weights = Weights.of(model)
        weights.stops |= {tokenizer.eos_token_id} - {None}
        made._loaded = template, weights
        return made

    @property
    def identity(self) -> Mapping[str, Any]:
        """A folder is known by its content, so it may move; a hub id by its commit. Raises
        LeadlineError where there is no model."""
        if self._identity is None:
            home = folder(self._path)
            if home:
                check_folder(home)
            given = read_template(self._chat_template) if self._chat_template else ""
            options = {
                "reasoning": self._reasoning,
                "dtype": self._dtype,
                "chat_template": given and blake2b(given.encode(), digest_size=16).hexdigest(),
                "chat_template_kwargs": self._arguments,
            }
            self._identity = {
                "model": home.resolve().name if home else self._path,
                "name": self.name,
                "interface": "local",
                "revision": fingerprint(home) if home else commit(self._path, self._revision),
                **{key: value for key, value in options.items() if value},
            }
        return self._identity

    async def prepare(self, *, prefix: bool) -> str:
        """Load tokenizer and weights. Raises LeadlineError where there are none to load. Local
        weights continue any prefix, so only the study itself can be a reason why not."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="leadline-generate")
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        return "" if self.prefix_way else f"{self.name}: the study says prefix: none for it"

    async def respond(self, request: Request) -> Response:
        """Never raises. What the chat template cannot express is finish "not_applicable", what
        fails is "error". `seconds` is the time that its batch took."""
        if self._loaded is None:
            return _failed(f"model {self.name} is not loaded: call prepare() first")
        template, weights = self._loaded
        try:
            prompt = template.render(request)
        except NotApplicable as why:
            return Response("", finish="not_applicable", error=str(why))
        except (LeadlineError, ValueError, TypeError) as error:
            return _failed(f"the prompt cannot be rendered: {one_line(error)}")
        size, most = len(prompt.ids), request.sampling.max_tokens
        if weights.context is not None:
            most = min(most, weights.context - size)
            if most < 1:
                return _failed(
                    f"prompt of {size} tokens does not fit the model's context of {weights.context}"
                )
        sampling = replace(request.sampling, max_tokens=most)
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append(Job(prompt.ids, sampling, request.sample, answered))
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run_batches(weights))
        reply: Reply = await answered
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
        """Give the weights back. What is still waiting is answered with an error."""
        self._loaded = None
        if self._batches is not None and not self._batches.done():
            self._batches.cancel()
            await asyncio.gather(self._batches, return_exceptions=True)
        self._give_up(self._waiting)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
            self._thread = None

    def _load(self) -> None:
        if self._loaded is None:
            content = str(self.identity["revision"])  # first: it checks what is there
            revision = None if folder(self._path) else content
            template = Template.load(
                self._path,
                reasoning=self._reasoning,
                chat_template=self._chat_template,
                revision=revision,
                arguments=self._arguments,
            )
            path = str(Path(self._path).expanduser()) if revision is None else self._path
            weights = Weights.load(path, revision, self._dtype, self._device)
            weights.stops |= {template.tokenizer.eos_token_id} - {None}
            self._loaded = template, weights

    async def _run_batches(self, weights: Weights) -> None:
        """Answer what is waiting, batch by batch, until nothing is."""
        stopped = threading.Event()
        batch: list[Job] = []
        loop, thread = asyncio.get_running_loop(), self._thread
        try:
            while self._waiting:
                full = len(self._waiting) >= self._batch_size
                await asyncio.sleep(0 if full else _MOMENT)
                batch = self._next_batch(min(self._batch_tokens, weights.max_batch_tokens))
                if batch:
                    replies = await loop.run_in_executor(
                        thread, weights.answer, batch, stopped.is_set
                    )
                    for job, reply in zip(batch, replies, strict=True):
                        if not job.future.done():
                            job.future.set_result(reply)
        finally:  # nothing may wait for ever, whatever ended this
            stopped.set()
            self._give_up(batch + self._waiting)

    def _give_up(self, jobs: list[Job]) -> None:
        self._waiting = []
        for job in jobs:
            if not job.future.done():
                job.future.set_result(Reply(error=f"model {self.name} was closed"))

    def _next_batch(self, batch_tokens: int) -> list[Job]:
        """The request that has waited longest, and those most like it: family by family of prompts
        that begin alike, as in a prefill sweep, and near to its own in length."""
        waiting = [job for job in self._waiting if not job.future.done()]  # or cancelled
        batch: list[Job] = []
        width = 0
        if waiting:
            alike = [job for job in waiting if job.settings == waiting[0].settings]
            kin = prefix_groups([job.ids for job in alike])
            own = next(family for family in kin if 0 in family)
            size = len(alike[own[0]].ids)
            kin.sort(key=lambda family: (family is not own, abs(len(alike[family[0]].ids) - size)))
            for job in [alike[n] for family in kin for n in family][: self._batch_size]:
                width = max(width, job.width)
                if batch and width * (len(batch) + 1) > batch_tokens:
                    break
                batch.append(job)
        chosen = set(map(id, batch))
        self._waiting = [job for job in waiting if id(job) not in chosen]
        return batch


def _failed(error: str) -> Response:
    return Response("", finish="error", error=error)
