"""KL divergence by token between a model and a reference model, along given answers.

KL_t = KL( model(. | prompt, answer_<t) || reference(. | prompt, answer_<t) ), Qi et al. 2025
(arXiv 2406.05946), section 2. Where alignment is shallow, only the first few tokens differ.

The logits of a large vocabulary are never held in memory as a whole: they are computed from hidden
states, block by block, and summed with an online log-sum-exp (Milakov and Gimelshein 2018, arXiv
1805.02867). For logits a and b, KL = E_p[a - b] - logsumexp(a) + logsumexp(b).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...analysis.intervals import LEVEL, RESAMPLES, Interval
from ...models.checkpoint import Checkpoint
from ...models.memory import memory_errors
from ...records import LeadlineError, Prompt
from ...report.depth.schema import Position
from ..positions import by_position, over_tokens
from ..tokenized import TokenizedPair, batches, tokenize_pairs
from .head import Head, SplitModel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Floats = np.ndarray[Any, np.dtype[np.float64]]

# The fastest pair in benchmarks/kl.py.
BLOCK = 2048  # vocabulary tokens at a time
_ROWS = 256  # positions at a time


@dataclass(frozen=True)
class Divergence:
    """KL(model || reference) in nats by position: the distributions at position t predict answer
    token t, counted from 0. `mean` is the KL per token over all answers, with its 95% interval.
    `settings` is everything else that the numbers depend on."""

    model: str
    reference: str
    points: tuple[Position, ...]
    mean: Interval
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, numbers and strings, for JSON."""
        points = [point.model_dump(exclude={"model"}) for point in self.points]
        mean = {k: v if math.isfinite(v) else None for k, v in self.mean._asdict().items()}
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "points": points, "mean": mean}


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
    """Compare the next-token distributions of two models at every token of the prompts' target
    answers.

    Models are folders (PEFT adapters too), hub ids or "organism:aligned". Both get the same tokens:
    the prompt in the chat template of `model` (with an empty thought if it is a reasoning model),
    then at most `max_tokens` tokens of the target. Intervals are from a bootstrap by base prompt.
    Where output layers are padded to different sizes, or one tokenizer has additional tokens at its
    end (such as a padding token), both distributions are over the shared tokens. A batch has at
    most `batch_tokens` tokens or one prompt; `progress(done, total)` counts prompts.

    Raises LeadlineError where the tokenizers differ, there is no prompt or one without a target, an
    answer does not fit a model's context, a model does not load, or its logits are not finite.
    """
    import numpy as np

    checkpoints = Checkpoint.find(model), Checkpoint.find(reference)
    pairs, shared = tokenize_pairs(*checkpoints, prompts, max_tokens)
    one, other = (SplitModel.load(c, pairs, dtype, device).limited(shared) for c in checkpoints)
    values = np.full((len(pairs), max(pair.answer for pair in pairs)), np.nan)
    for pair, kl in compare(pairs, one, other, batch_tokens=batch_tokens, progress=progress):
        values[pair.index, : pair.answer] = kl
    bases = [pair.base for pair in pairs]
    settings = {
        "revisions": [checkpoint.revision for checkpoint in checkpoints],
        "dtypes": [str(split.model.dtype).removeprefix("torch.") for split in (one, other)],
        "streamed": one.streams and other.streams,
        "vocabulary": min(one.head.size, other.head.size),
        "max_tokens": max_tokens,
        "prompts": len(pairs),
        "base_prompts": len(set(bases)),
        "resamples": RESAMPLES,
        "level": LEVEL,
    }
    points, mean = by_position(values, bases), over_tokens(values, bases)
    return Divergence(str(model), str(reference), points, mean, settings)


def compare(
    pairs: Sequence[TokenizedPair],
    p: SplitModel,
    q: SplitModel,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[TokenizedPair, Floats]]:
    """KL(p || q) in nats at each answer token of each pair ([answer]), the longest pair first.

    Raises LeadlineError where logits are not finite.
    """
    import numpy as np

    done = 0
    for batch in batches(pairs, batch_tokens if p.streams and q.streams else 0):
        for pair, kl in zip(batch, _compare(batch, p, q), strict=True):
            if not np.isfinite(kl).all():
                raise LeadlineError(
                    f"prompt {pair.prompt.id}: the logits of one of the two models are not "
                    "finite: load them in another dtype, such as float32"
                )
            yield pair, kl
        done += len(batch)
        if progress:
            progress(done, len(pairs))


def _compare(batch: Sequence[TokenizedPair], p: SplitModel, q: SplitModel) -> list[Floats]:
    """KL at each answer token of each pair."""
    import torch

    size = f"{len(batch)} prompts of up to {len(batch[0].ids)} tokens"
    with (
        memory_errors(f"out of memory on {size}: set a lower batch_tokens or max_tokens"),
        torch.inference_mode(),
    ):
        kl = streamed_kl(p.hidden(batch), p.head, q.hidden(batch), q.head)
    return [part.numpy() for part in kl.double().cpu().split([pair.answer for pair in batch])]


def streamed_kl(
    hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head, *, block: int = BLOCK
) -> Tensor:
    """KL(p || q) in nats for each row of hidden states: [N], float32.

    The hidden states are [N, width of their model]; the distributions are over the tokens that both
    heads have. Needs memory for 256 x `block` logits of each model, whatever N and the vocabulary
    size. The models may be on different devices; the result is on that of p's head. Agrees with a
    float64 log-softmax of the same logits to 1e-6 x (10 + the largest difference between two
    logits).
    """
    import torch

    parts = [
        _stream(p, head_p, q, head_q, block)
        for p, q in zip(hidden_p.split(_ROWS), hidden_q.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).clamp_min_(0)


def _stream(p: Tensor, head_p: Head, q: Tensor, head_q: Head, block: int) -> Tensor:
    # Logits are a (of p) and b (of q). Running maxima of a and b, and sums of e^(a - top_a),
    # e^(b - top_b) and e^(a - top_a) (a - b).
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
