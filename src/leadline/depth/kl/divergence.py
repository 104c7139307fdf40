"""KL by token: how far a model's next token is from a reference's, along given answers.

KL_t = KL( model(. | prompt, answer_<t) || reference(. | prompt, answer_<t) ), Qi et al. 2025
(arXiv 2406.05946), section 2. Where alignment is shallow, only the first few tokens differ.

The logits of a large vocabulary never stand whole in memory: they are made from hidden states,
block by block, and summed by an online log-sum-exp (Milakov and Gimelshein 2018, arXiv
1805.02867). For logits a and b, KL = E_p[a - b] - logsumexp(a) + logsumexp(b).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...analysis.clusters import LEVEL, RESAMPLES
from ...records import LeadlineError, Prompt
from .head import Head, Side
from ...models.checkpoint import Checkpoint
from ..tokenized import Row, batches, read
from ..positions import Point, by_position

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Floats = np.ndarray[Any, np.dtype[np.float64]]

BLOCK = 2048  # tokens of the vocabulary at a time: measured, with _ROWS, to suit a cache
_ROWS = 256  # positions at a time


@dataclass(frozen=True)
class Divergence:
    """KL(model || reference) in nats by position; position k comes after k tokens of the answer.
    `settings` is what else decided the numbers."""

    model: str
    reference: str
    points: tuple[Point, ...]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, numbers and strings, for JSON."""
        return asdict(self)


def kl_by_token(
    model: str | Path,
    reference: str | Path,
    prompts: Iterable[Prompt],
    *,
    max_tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Run both models along each prompt's `target` and compare them at every token of it.

    Models are folders (PEFT adapters too), hub ids or "organism:aligned". Both read the same
    tokens: the prompt in the chat template of `model`, a thought closed where it has them, then
    at most `max_tokens` tokens of the target. Intervals draw base prompts with replacement.
    Where heads are padded to different sizes, or one tokenizer has more tokens behind the other's
    (such as one to pad with), both distributions are over the tokens that they share. A batch holds
    at most `batch_tokens` tokens, or one prompt; `progress(prompts done, prompts in all)` is called
    after each.

    Raises LeadlineError where the tokenizers differ, a prompt has no target, an answer does not
    fit a model's context, a model does not load, or its logits are not finite.
    """
    import numpy as np

    ours, theirs = Checkpoint.find(model), Checkpoint.find(reference)
    rows, shared = read(ours, theirs, prompts, max_tokens)
    sides = [Side.load(home, rows, dtype, device).cut(shared) for home in (ours, theirs)]
    values = np.full((len(rows), max(row.answer for row in rows)), np.nan)
    done = 0
    streamed = all(side.streams for side in sides)
    for batch in batches(rows, batch_tokens if streamed else 0):
        found = _compare(batch, *sides)
        for row, kl in zip(batch, found, strict=True):
            if not np.isfinite(kl).all():
                raise LeadlineError(
                    f"prompt {row.prompt.id}: the logits of {model} or {reference} are not "
                    "finite: load them in another dtype, such as float32"
                )
            values[row.at, : row.answer] = kl
        done += len(batch)
        if progress:
            progress(done, len(rows))
    bases = [row.prompt.base or row.prompt.id for row in rows]
    settings = {
        "revisions": [home.revision for home in (ours, theirs)],
        "dtypes": [str(side.model.dtype).removeprefix("torch.") for side in sides],
        "streamed": streamed,
        "vocabulary": min(side.head.size for side in sides),
        "max_tokens": max_tokens,
        "prompts": len(rows),
        "base_prompts": len(set(bases)),
        "resamples": RESAMPLES,
        "level": LEVEL,
    }
    return Divergence(str(model), str(reference), by_position(values, bases), settings)


def _compare(batch: Sequence[Row], p: Side, q: Side) -> list[Floats]:
    """The KL at each answer token of each row."""
    import torch

    try:
        with torch.inference_mode():
            kl = streamed_kl(p.hidden(batch), p.head, q.hidden(batch), q.head)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise LeadlineError(
                f"out of memory on {len(batch)} prompts of up to {len(batch[0].ids)} tokens: "
                "set a lower batch_tokens or max_tokens"
            ) from error
        raise
    return [part.numpy() for part in kl.double().cpu().split([row.answer for row in batch])]


def streamed_kl(
    hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head, *, block: int = BLOCK
) -> Tensor:
    """KL(p || q) in nats for each row: [N] float32, from hidden states [N, width of each model],
    over the tokens that both heads have.

    Takes memory for the logits of 256 x `block` tokens, whatever N and the vocabulary are. The
    two may lie on different devices; the result lies where p's head does. Agrees with a float64
    log-softmax of the same logits to 1e-6 x (10 + the largest difference between two logits).
    """
    import torch

    parts = [
        _stream(p, head_p, q, head_q, block)
        for p, q in zip(hidden_p.split(_ROWS), hidden_q.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).clamp_min_(0)


def _stream(p: Tensor, head_p: Head, q: Tensor, head_q: Head, block: int) -> Tensor:
    # Running maxima of a and b, and sums of e^(a - top_a), e^(b - top_b), e^(a - top_a) (a - b).
    top_a: Any = -math.inf
    top_b: Any = -math.inf
    sum_a: Any = 0.0
    sum_b: Any = 0.0
    gaps: Any = 0.0
    size = min(head_p.size, head_q.size)
    for start in range(0, size, block):
        stop = min(start + block, size)
        a = head_p.logits(p, start, stop)
        b = head_q.logits(q, start, stop).to(a.device)
        gap = a - b
        top = a.amax(1, keepdim=True).clamp_min(top_a)
        shrink, top_a = (top_a - top).exp(), top
        a.sub_(top).exp_()
        sum_a = sum_a * shrink + a.sum(1, keepdim=True)
        gaps = gaps * shrink + gap.mul_(a).sum(1, keepdim=True)
        top = b.amax(1, keepdim=True).clamp_min(top_b)
        shrink, top_b = (top_b - top).exp(), top
        sum_b = sum_b * shrink + b.sub_(top).exp_().sum(1, keepdim=True)
    kl: Tensor = gaps / sum_a - (top_a - top_b) - (sum_a.log() - sum_b.log())
    return kl.squeeze(1)
