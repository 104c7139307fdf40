"""Two models that read the same tokens: found, checked, loaded, and run up to their heads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import organism
from ...models import reasoning
from ...models.template import Template, load_tokenizer
from ...models.checkpoint import commit, folder
from ...models.weights import Weights
from ...models.checkpoint import check, fingerprint
from ...records import LeadlineError, Message, Prompt, Request, ResponsePrefix, Sampling

if TYPE_CHECKING:
    from torch import Tensor

# What configs call the numbers that their models put between head and logits. Some multiply by
# one and others divide by it, so each is tried, and the model's own logits decide.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")

_log = logging.getLogger("leadline")


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: cap * tanh(scale * (hidden @ weight.T + bias) / cap), where
    no `cap` is no squashing. `weight` is [size or more, width], in any floating dtype; with None,
    the hidden states are the logits already."""

    size: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """[rows, stop - start], float32 whatever the weights are, and the caller's to overwrite:
        half precision would round away most of a small divergence."""
        import torch

        if self.weight is None:
            return hidden[:, start:stop].to(torch.float32, copy=True)
        weight = self.weight[start:stop].float()
        bias = None if self.bias is None else self.bias[start:stop].to(weight)
        made: Tensor = torch.nn.functional.linear(hidden.to(weight), weight, bias)
        if self.cap is not None:
            return made.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return made if self.scale == 1 else made.mul_(self.scale)


@dataclass(frozen=True)
class Side:
    """One of the two models, with the head that its hidden states go through."""

    model: Any
    head: Head

    @staticmethod
    def load(home: Checkpoint, rows: Sequence[Row], dtype: str | None, device: str | None) -> Side:
        weights = Weights.load(home.path, home.pinned, dtype, device)
        longest = max(rows, key=lambda row: len(row.ids))
        if weights.context is not None and len(longest.ids) - 1 > weights.context:
            raise LeadlineError(
                f"prompt {longest.prompt.id} with its answer has {len(longest.ids)} tokens, and "
                f"{home.name} reads {weights.context}: leave the prompt out, or set a lower "
                "max_tokens"
            )
        side = Side(weights.model, _head(weights.model, longest.ids[-9:-1]))
        if not side.streams:
            _log.warning(
                "%s: its logits are not its last hidden states times its output weights, so they "
                "are computed in full, prompt by prompt, which takes more time and memory",
                home.name,
            )
        return side

    def cut(self, size: int | None) -> Side:
        """With logits of the first `size` tokens at most."""
        fewer = self.head.size if size is None else min(size, self.head.size)
        return replace(self, head=replace(self.head, size=fewer))

    @property
    def streams(self) -> bool:
        return self.head.weight is not None

    def hidden(self, batch: Sequence[Row]) -> Tensor:
        """The states that predict each answer token, row after row: [tokens, width].

        Padding stands on the right, where causal attention never looks, whatever side the
        tokenizer would pad: positions are right in models of any kind, and none needs a mask.
        """
        import torch

        width = max(len(row.ids) for row in batch) - 1
        ids = torch.tensor([row.ids[:-1] + [0] * (width + 1 - len(row.ids)) for row in batch])
        states = _forward(self.model, ids, logits=not self.streams)
        ends = zip(states, batch, strict=True)
        return torch.cat([s[len(r.ids) - 1 - r.answer : len(r.ids) - 1] for s, r in ends])


def _forward(model: Any, ids: Tensor, *, logits: bool) -> Tensor:
    """The last hidden states, or the logits: [batch, tokens, width or vocabulary]."""
    run = model if logits else model.base_model
    ids = ids.to(model.device)
    out = run(input_ids=ids, attention_mask=ids.new_ones(ids.shape), use_cache=False)
    states: Tensor = out.logits if logits else out.last_hidden_state
    return states


def _head(model: Any, probe: list[int]) -> Head:
    """The head that gives the model's own logits of a few tokens; else one that is given them."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([probe])
        own = _forward(model, ids, logits=True)[0].float()
        size = own.shape[-1]
        if heads := list(_heads(model, size)):
            hidden = _forward(model, ids, logits=False)[0]
            errors = [(h.logits(hidden, 0, size).to(own) - own).norm() / own.norm() for h in heads]
            error, best = min((float(error), at) for at, error in enumerate(errors))
            if error <= max(2 * torch.finfo(model.dtype).eps, 1e-4):
                return heads[best]
    return Head(size)


def _heads(model: Any, size: int) -> Iterator[Head]:
    """What the model's head may be, going by its config."""
    layer = model.get_output_embeddings()
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if model.base_model is model or weight is None or weight.ndim != 2 or len(weight) < size:
        return
    if weight.is_meta or not weight.is_floating_point():  # offloaded, or quantized
        return
    config = model.config.get_text_config()
    named = [getattr(config, key, None) for key in _SCALES]
    scales = [s for s in named if isinstance(s, int | float) and s not in (0, 1)]
    cap = next((c for key in _CAPS if (c := getattr(config, key, None))), None)
    for scale in (1.0, *scales, *(1 / s for s in scales)):
        plain = Head(size, weight, bias, scale)
        yield plain
        if cap:
            yield replace(plain, cap=cap)
