"""Local weights, loaded with transformers: batched generation with a generator per request.

torch is imported by the functions that use it, not by this module.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partialmethod
from hashlib import blake2b
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..records import Finish, LeadlineError, Sampling
from ..text import one_line
from . import shared_prefix
from .checkpoint import is_gguf
from .memory import out_of_memory
from .template import LOADING, quiet, source

if TYPE_CHECKING:
    import torch

log = logging.getLogger("leadline")


@dataclass(eq=False, slots=True)
class Job:
    """A rendered prompt to continue: its token ids, sampling settings, the number of the sample,
    and the future that receives the reply."""

    ids: list[int]
    sampling: Sampling
    sample: int
    future: asyncio.Future[Reply]

    @property
    def settings(self) -> Sampling:
        """The sampling settings that all jobs of a batch must have in common."""
        return replace(self.sampling, seed=None)

    @property
    def width(self) -> int:
        """Number of tokens of the prompt and the longest possible answer."""
        return len(self.ids) + self.sampling.max_tokens

    @property
    def seed(self) -> int:
        """Seed of the job's own generator: a hash of its seed, sample number and prompt."""
        text = json.dumps([self.sampling.seed or 0, self.sample, self.ids])
        return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a job: the generated ids without the end token, the number of generated tokens
    including the end token, and the seconds that the batch took; or an error."""

    ids: Sequence[int] = ()
    finish: Finish = "error"
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass
class Weights:
    """A loaded model, its end tokens, its context length, and its default top_p and top_k.

    `max_batch_tokens` is lowered when a batch runs out of memory. `prefix_sharing` is whether a
    prefix that several prompts share may be computed once (None: not checked yet).
    """

    model: Any
    stops: set[int]
    context: int | None
    top_p: float
    top_k: int
    max_batch_tokens: int = 2**62
    prefix_sharing: bool | None = None

    @staticmethod
    def load(path: str, revision: str | None, dtype: str | None, device: str | None) -> Weights:
        """Load a causal language model from a folder, hub id or GGUF file, whose weights are
        unpacked to `dtype`; code from the hub never runs.

        The defaults are bfloat16 on a GPU (spread over several where accelerate is installed) and
        float32 on the CPU. Raises LeadlineError where the weights do not load or are incomplete.
        """
        import torch

        with LOADING:
            import transformers

            auto: Any = transformers.AutoModelForCausalLM
        gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
        placement = {"device_map": "auto"} if gpu and not device and find_spec("accelerate") else {}
        # Without this, weights can stay packed, which can be neither trained nor saved.
        packed = getattr(transformers, "GgufConfig", None) if is_gguf(path) else None
        unpack = {"quantization_config": packed(dequantize=True)} if packed else {}
        model: Any
        try:
            with LOADING, quiet(), _no_bars(), warnings.catch_warnings(action="ignore"):
                model, loading_info = auto.from_pretrained(
                    **source(path),
                    **unpack,
                    revision=revision,
                    dtype=dtype or (torch.bfloat16 if gpu else torch.float32),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **placement,
                )
                if not placement:
                    model.to(device or ("cuda" if gpu else "cpu"))
        except Exception as error:
            raise LeadlineError(
                f"model {path} does not load ({one_line(error)}): use a causal language model "
                "with safetensors or GGUF weights that this transformers version supports"
            ) from error
        if missing := sorted(loading_info["missing_keys"]):
            raise LeadlineError(
                f"model {path}: its weights lack {len(missing)} tensors that its config.json "
                f"requires, such as {missing[0]}: save the model again"
            )
        return Weights.of(model.eval())

    @staticmethod
    def of(model: Any) -> Weights:
        """Wrap a model that is already loaded, without changing it."""
        generation = model.generation_config
        return Weights(
            model,
            stops=_ids(generation.eos_token_id) | _ids(getattr(model.config, "eos_token_id", None)),
            context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            top_p=1.0 if generation.top_p is None else generation.top_p,
            top_k=generation.top_k or 0,
        )

    def answer(self, jobs: Sequence[Job], stopped: Callable[[], bool]) -> list[Reply]:
        """A reply for each job; all jobs have the same `settings`.

        A batch that fails is split into two halves, down to single jobs, whose error is returned
        in the reply. Generation ends early once `stopped()` is true.
        """
        import torch

        tokens = max(job.width for job in jobs) * len(jobs)
        if len(jobs) == 1 or tokens <= self.max_batch_tokens:
            try:
                return self._generate(jobs, stopped)
            except Exception as error:
                if len(jobs) == 1:
                    return [Reply(error=f"{type(error).__name__}: {one_line(error)}")]
                if out_of_memory(error):
                    self.max_batch_tokens = tokens // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = len(jobs) // 2
        return self.answer(jobs[:half], stopped) + self.answer(jobs[half:], stopped)

    def _generate(self, jobs: Sequence[Job], stopped: Callable[[], bool]) -> list[Reply]:
        import torch

        began = time.perf_counter()
        with torch.inference_mode(), quiet():
            answers = self._generate_shared(jobs, stopped)
            if answers is None:
                answers = self._generate_padded(jobs, stopped)
        seconds = time.perf_counter() - began
        return [self._reply(ids, jobs[0].sampling, seconds) for ids in answers]

    def _generate_padded(self, jobs: Sequence[Job], stopped: Callable[[], bool]) -> list[list[int]]:
        """The tokens generated after each prompt, including those after an end token."""
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
            # Always take the largest score: sampling is done by the processor of `_draw`.
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=sorted(self.stops) or None,
            logits_processor=[self._draw(jobs)] if sampling.temperature > 0 else [],
            stopping_criteria=[lambda ids, scores: ids.new_full(ids.shape[:1], stopped()) > 0],
        )
        answers: list[list[int]] = out[:, width:].tolist()
        return answers

    def _generate_shared(
        self, jobs: Sequence[Job], stopped: Callable[[], bool]
    ) -> list[list[int]] | None:
        """Like `_generate_padded`, with shared prefixes computed once; None where that saves too
        little or the model does not support it."""
        prefixes = shared_prefix.SharedPrefixes([job.ids for job in jobs])
        sampling = jobs[0].sampling
        if self.prefix_sharing is False or not prefixes.worthwhile:
            return None
        model = shared_prefix.unwrapped(self.model)
        reason = shared_prefix.unsupported_reason(model, max(job.width for job in jobs))
        if not reason:
            try:
                if self.prefix_sharing is None:
                    shared_prefix.check_equivalence(model, prefixes.longest[0])
                    self.prefix_sharing = True
                draw = self._draw(jobs) if sampling.temperature > 0 else lambda ids, scores: scores
                return shared_prefix.generate(
                    model,
                    prefixes,
                    sampling.max_tokens,
                    lambda scores: draw(None, scores).argmax(-1),
                    greedy=sampling.temperature == 0,
                    stops=self.stops,
                    stopped=stopped,
                )
            except Exception as error:
                if out_of_memory(error):
                    raise
                self.prefix_sharing, reason = False, one_line(error)
        log.debug("shared prefixes of prompts are not reused: %s", reason)
        return None

    def _reply(self, ids: list[int], sampling: Sampling, seconds: float) -> Reply:
        end = next((n for n, token in enumerate(ids) if token in self.stops), None)
        if end is not None:
            return Reply(ids[:end], "stop", end + 1, seconds)
        if len(ids) < sampling.max_tokens:
            return Reply(error="stopped before the answer was complete")
        return Reply(ids, "length", len(ids), seconds)

    def _draw(self, jobs: Sequence[Job]) -> Callable[[Any, Any], Any]:
        """A logits processor after which the largest score is a sample from the distribution.

        It divides each probability by an exponential variate (an exponential race, equivalent to
        the Gumbel-max trick). Each row has its own generator, seeded by its job.
        """
        import torch
        from transformers.generation import logits_process

        sampling = jobs[0].sampling
        top_p = self.top_p if sampling.top_p is None else sampling.top_p
        top_k = self.top_k if sampling.top_k is None else sampling.top_k
        warpers: list[Any] = [logits_process.TemperatureLogitsWarper(float(sampling.temperature))]
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
            probabilities = scores.float().softmax(-1)
            variates = torch.empty_like(probabilities)
            for row, generator in zip(variates, generators, strict=True):
                row.exponential_(generator=generator)
            return probabilities / variates

        return draw


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turn off the progress bars of tqdm, which transformers uses directly for GGUF files."""
    from tqdm import tqdm

    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original


def _ids(value: int | Sequence[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
