"""Weights on this machine: known by their content, loaded with transformers, generating.

Everything that touches torch runs in one worker thread; torch is imported by `Weights.load`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..records import Finish, LeadlineError, Sampling
from ..text import one_line
from . import shared_prefix
from .memory import out_of_memory
from .template import quiet

if TYPE_CHECKING:
    import torch

log = logging.getLogger("leadline")


@dataclass(eq=False, slots=True)
class Job:
    ids: list[int]
    sampling: Sampling
    sample: int
    answered: asyncio.Future[Reply]

    @property
    def settings(self) -> Sampling:
        return replace(self.sampling, seed=None)

    @property
    def width(self) -> int:
        return len(self.ids) + self.sampling.max_tokens

    @property
    def seed(self) -> int:
        about = json.dumps([self.sampling.seed or 0, self.sample, self.ids])
        return int.from_bytes(blake2b(about.encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True, slots=True)
class Reply:
    """Generated ids without the one that ended them, which `tokens` counts."""

    ids: Sequence[int] = ()
    finish: Finish = "error"
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass
class Weights:
    """A loaded model; lives in the worker thread. `bearable` is how many tokens a batch may have
    since one ran out of memory, `shares` whether what prompts begin with may be computed once
    (None: not tried yet)."""

    model: Any
    stops: set[int]
    context: int | None
    top_p: float
    top_k: int
    bearable: int = 2**62
    shares: bool | None = None

    @staticmethod
    def load(path: str, revision: str | None, dtype: str | None, device: str | None) -> Weights:
        import torch
        from transformers import AutoModelForCausalLM

        gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
        spread = {"device_map": "auto"} if gpu and not device and find_spec("accelerate") else {}
        auto: Any = AutoModelForCausalLM
        model: Any
        try:
            with quiet(), warnings.catch_warnings(action="ignore"):
                model, found = auto.from_pretrained(
                    path,
                    revision=revision,
                    dtype=dtype or (torch.bfloat16 if gpu else torch.float32),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **spread,
                )
                if not spread:
                    model.to(device or ("cuda" if gpu else "cpu"))
        except Exception as error:
            raise LeadlineError(
                f"model {path} does not load ({one_line(error)}): give a causal language model "
                "with safetensors weights that this transformers version knows"
            ) from error
        if missing := sorted(found["missing_keys"]):
            raise LeadlineError(
                f"model {path}: its weights lack {len(missing)} tensors that its config.json asks "
                f"for, {missing[0]} first: save the model again"
            )
        return Weights.of(model.eval())

    @staticmethod
    def of(model: Any) -> Weights:
        """A model at hand, which is left as it is."""
        own = model.generation_config
        return Weights(
            model,
            stops=_ids(own.eos_token_id) | _ids(getattr(model.config, "eos_token_id", None)),
            context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            top_p=1.0 if own.top_p is None else own.top_p,
            top_k=own.top_k or 0,
        )

    def answer(self, jobs: Sequence[Job], stopped: Callable[[], bool]) -> list[Reply]:
        """A reply for each job. What fails as a batch is tried as two halves, down to one."""
        import torch

        tokens = max(job.width for job in jobs) * len(jobs)
        if len(jobs) == 1 or tokens <= self.bearable:
            try:
                return self._generate(jobs, stopped)
            except Exception as error:
                if len(jobs) == 1:
                    return [Reply(error=f"{type(error).__name__}: {one_line(error)}")]
                if out_of_memory(error):
                    self.bearable = tokens // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = len(jobs) // 2
        return self.answer(jobs[:half], stopped) + self.answer(jobs[half:], stopped)

    def _generate(self, jobs: Sequence[Job], stopped: Callable[[], bool]) -> list[Reply]:
        import torch

        began = time.perf_counter()
        with torch.inference_mode(), quiet():
            found = self._share(jobs, stopped)
            if found is None:
                found = self._continue(jobs, stopped)
        seconds = time.perf_counter() - began
        return [self._reply(ids, jobs[0].sampling, seconds) for ids in found]

    def _continue(self, jobs: Sequence[Job], stopped: Callable[[], bool]) -> list[list[int]]:
        """What is written after each prompt, with what stands behind an end token."""
        import torch

        sampling = jobs[0].sampling
        width, pad = max(len(job.ids) for job in jobs), min(self.stops, default=0)
        ids = torch.tensor([[pad] * (width - len(job.ids)) + job.ids for job in jobs])
        lengths = torch.tensor([len(job.ids) for job in jobs])
        mask = torch.arange(width) >= width - lengths[:, None]
        out = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.long().to(self.model.device),
            max_new_tokens=sampling.max_tokens,
            # The largest score always wins here: sampling happens in `_draw`.
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=sorted(self.stops) or None,
            logits_processor=[self._draw(jobs)] if sampling.temperature > 0 else [],
            stopping_criteria=[lambda ids, scores: ids.new_full(ids.shape[:1], stopped()) > 0],
        )
        written: list[list[int]] = out[:, width:].tolist()
        return written

    def _share(self, jobs: Sequence[Job], stopped: Callable[[], bool]) -> list[list[int]] | None:
        """The same, with what prompts begin with computed once; None where that does not pay, or
        might not be the same."""
        trunks, sampling = shared_prefix.Trunks([job.ids for job in jobs]), jobs[0].sampling
        if self.shares is False or not trunks.pay:
            return None
        model = shared_prefix.bare(self.model)
        why = shared_prefix.unusual(model, max(job.width for job in jobs))
        if not why:
            try:
                if self.shares is None:
                    shared_prefix.prove(model, trunks.ids[0])
                    self.shares = True
                draw = self._draw(jobs) if sampling.temperature > 0 else lambda ids, scores: scores
                return shared_prefix.answers(
                    model,
                    trunks,
                    sampling.max_tokens,
                    lambda scores: draw(None, scores).argmax(-1),
                    greedy=sampling.temperature == 0,
                    stops=self.stops,
                    stopped=stopped,
                )
            except Exception as error:
                if out_of_memory(error):
                    raise
                self.shares, why = False, one_line(error)
        log.debug("prompts that begin alike are not shared: %s", why)
        return None

    def _reply(self, ids: list[int], sampling: Sampling, seconds: float) -> Reply:
        end = next((n for n, token in enumerate(ids) if token in self.stops), None)
        if end is not None:
            return Reply(ids[:end], "stop", end + 1, seconds)
        if len(ids) < sampling.max_tokens:
            return Reply(error="stopped before the answer was complete")
        return Reply(ids, "length", len(ids), seconds)

    def _draw(self, jobs: Sequence[Job]) -> Callable[[Any, Any], Any]:
        """A logits processor after which the largest score is a draw from the distribution: the
        winner of an exponential race, each row with a generator of its own."""
        import torch
        from transformers.generation import logits_process

        asked = jobs[0].sampling
        top_p = self.top_p if asked.top_p is None else asked.top_p
        top_k = self.top_k if asked.top_k is None else asked.top_k
        warpers: list[Any] = [logits_process.TemperatureLogitsWarper(float(asked.temperature))]
        if top_k > 0:
            warpers.append(logits_process.TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(logits_process.TopPLogitsWarper(top_p))
        generators: list[torch.Generator] = []

        def draw(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not generators:
                generators.extend(torch.Generator(scores.device) for _ in jobs)
                for generator, job in zip(generators, jobs, strict=True):
                    generator.manual_seed(job.seed)
            for warp in warpers:
                scores = warp(ids, scores)
            chances = scores.float().softmax(-1)
            race = torch.empty_like(chances)
            for row, generator in zip(race, generators, strict=True):
                row.exponential_(generator=generator)
            return chances / race

        return draw


def _ids(value: int | Sequence[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
