"""A model split into a body and an output head, so that logits can be computed block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...models.checkpoint import Checkpoint
from ...models.weights import Weights
from ..tokenized import TokenizedPair, check_context

if TYPE_CHECKING:
    from torch import Tensor

# Config fields for the numbers that models apply between head and logits. Some models multiply by
# such a number and others divide by it, so both are tried and compared with the model's logits.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")

_log = logging.getLogger("leadline")


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: cap * tanh(scale * (hidden @ weight.T + bias) / cap);
    without `cap`, scale * (hidden @ weight.T + bias).

    `weight` is [size or more, width], in any floating dtype; None means that the hidden states
    already are the logits.
    """

    size: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits of the tokens from `start` to `stop`: [rows, stop - start], a new tensor.

        Always float32, since half precision would lose most of a small divergence.
        """
        import torch

        if self.weight is None:
            return hidden[:, start:stop].to(torch.float32, copy=True)
        weight = self.weight[start:stop].float()
        bias = None if self.bias is None else self.bias[start:stop].to(weight)
        logits: Tensor = torch.nn.functional.linear(hidden.to(weight), weight, bias)
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1 else logits.mul_(self.scale)


@dataclass(frozen=True)
class SplitModel:
    """A loaded model with its output head."""

    model: Any
    head: Head

    @staticmethod
    def load(
        checkpoint: Checkpoint,
        pairs: Sequence[TokenizedPair],
        dtype: str | None,
        device: str | None,
    ) -> SplitModel:
        """Load a model to run on `pairs`.

        Raises LeadlineError where it does not load or a pair is longer than its context.
        """
        weights = Weights.load(checkpoint.path, checkpoint.pinned, dtype, device)
        check_context(checkpoint.name, pairs, weights.context, spare=1)
        longest = max(pairs, key=lambda pair: len(pair.ids))
        split = SplitModel(weights.model, _head(weights.model, longest.ids[-9:-1]))
        if not split.streams:
            _log.warning(
                "%s: its logits are not a linear function of its last hidden states, so they are "
                "computed in full, prompt by prompt, which takes more time and memory",
                checkpoint.name,
            )
        return split

    def limited(self, size: int | None) -> SplitModel:
        """A copy with logits of at most the first `size` tokens of the vocabulary."""
        size = self.head.size if size is None else min(size, self.head.size)
        return replace(self, head=replace(self.head, size=size))

    @property
    def streams(self) -> bool:
        """Whether logits can be computed from hidden states, block by block."""
        return self.head.weight is not None

    def hidden(self, batch: Sequence[TokenizedPair]) -> Tensor:
        """The hidden states that predict each answer token, pair after pair: [tokens, width]; the
        logits where `streams` is false.

        Padding is always on the right, where causal attention never reads it, so that positions
        are correct in every architecture and no mask is needed.
        """
        import torch

        width = max(len(pair.ids) for pair in batch) - 1
        ids = torch.tensor([pair.ids[:-1] + [0] * (width + 1 - len(pair.ids)) for pair in batch])
        states = _forward(self.model, ids, logits=not self.streams)
        rows = zip(states, batch, strict=True)
        return torch.cat([s[len(p.ids) - 1 - p.answer : len(p.ids) - 1] for s, p in rows])


def _forward(model: Any, ids: Tensor, *, logits: bool) -> Tensor:
    """The last hidden states, or the logits: [batch, tokens, width or vocabulary]."""
    run = model if logits else model.base_model
    ids = ids.to(model.device)
    out = run(input_ids=ids, attention_mask=ids.new_ones(ids.shape), use_cache=False)
    states: Tensor = out.logits if logits else out.last_hidden_state
    return states


def _head(model: Any, probe: list[int]) -> Head:
    """The candidate head that reproduces the model's logits of a few tokens; if there is none, a
    head without weights, for a `SplitModel` that computes logits in full."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([probe])
        own = _forward(model, ids, logits=True)[0].float()
        size = own.shape[-1]
        if heads := list(_heads(model, size)):
            hidden = _forward(model, ids, logits=False)[0]
            errors = [(h.logits(hidden, 0, size).to(own) - own).norm() / own.norm() for h in heads]
            error, best = min((float(error), n) for n, error in enumerate(errors))
            if error <= max(2 * torch.finfo(model.dtype).eps, 1e-4):
                return heads[best]
    return Head(size)


def _heads(model: Any, size: int) -> Iterator[Head]:
    """Candidate heads, from the model's output layer and config."""
    layer = model.get_output_embeddings()
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if model.base_model is model or weight is None or weight.ndim != 2 or len(weight) < size:
        return
    if weight.is_meta or not weight.is_floating_point():  # offloaded or quantized
        return
    config = model.config.get_text_config()
    configured = [getattr(config, key, None) for key in _SCALES]
    scales = [s for s in configured if isinstance(s, int | float) and s not in (0, 1)]
    cap = next((c for key in _CAPS if (c := getattr(config, key, None))), None)
    for scale in (1.0, *scales, *(1 / s for s in scales)):
        head = Head(size, weight, bias, scale)
        yield head
        if cap:
            yield replace(head, cap=cap)
