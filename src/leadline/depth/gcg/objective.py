"""The loss of suffixes: the expensive part of a GCG search, computed exactly.

Keys and values of tokens that do not change are computed once and shared by all candidates, a
candidate is computed from its first changed token on, and the output layer runs only on the
positions that predict the target.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ...models.memory import batch_memory
from ...records import LeadlineError, Prompt
from .surrogate import Slot, Surrogate

if TYPE_CHECKING:
    import torch

    from .config import GCGConfig

    KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]

_VOCABULARY_BLOCK = 8192
_CPU_MIB = 32  # the allocator returns larger buffers to the system after each forward pass
_log = logging.getLogger("leadline")


class Objective:
    """The loss of suffixes: the mean over models and prompts of the targets' mean token loss.

    Suffixes are token ids of the lead model: the first of `models`, or that of another objective
    given as `lead`. Models that tokenize the suffix like the lead model are given these ids, other
    models the text.
    """

    def __init__(
        self,
        models: Sequence[Surrogate],
        prompts: Sequence[Prompt],
        config: GCGConfig,
        lead: Objective | None = None,
    ) -> None:
        self.lead: Surrogate = lead.lead if lead else models[0]
        self.start: list[int] = lead.start if lead else []
        memory = config.memory_mib and config.memory_mib * 2**20
        words = self.lead.vocabulary
        self._models: list[list[Losses]] = []
        for model in models:
            slots = [Slot.find(model, p, config.suffix, config.target_tokens) for p in prompts]
            if lead is None and not self._models:
                self.start = slots[0].suffix
            same = model is self.lead or model.vocabulary == words
            self._models.append(
                [Losses(model, s, memory, takes_ids=same and s.suffix == self.start) for s in slots]
            )
        self._all = [losses for of_model in self._models for losses in of_model]

    def text(self, suffix: list[int]) -> str:
        """A suffix as text."""
        return self.lead.text([suffix])[0]

    def move(self, suffix: list[int]) -> None:
        """Make a suffix the current one, whose gradient `gradient` returns and whose keys and
        values other suffixes reuse."""
        for losses, (context,) in self._contexts([suffix]):
            losses.move(context)

    def of(self, suffixes: list[list[int]]) -> torch.Tensor:
        """The losses of suffixes: [len(suffixes)]."""
        import torch

        each = [losses.of(contexts) for losses, contexts in self._contexts(suffixes)]
        return torch.stack(each).mean(0)

    def gradient(self) -> torch.Tensor:
        """The gradient of the current suffix's loss: [suffix length, vocabulary].

        The mean over prompts, for models that are given ids. With several such models, gradients
        are normalised at each position, so that every model has the same weight.
        """
        import torch

        gradients = []
        for of_model in self._models:
            if each := [losses.gradient()[1] for losses in of_model if losses.takes_ids]:
                gradients.append(torch.stack(each).mean(0))
        if len(gradients) == 1:
            return gradients[0]
        width = min(gradient.shape[1] for gradient in gradients)
        units = [g[:, :width] / g.norm(dim=1, keepdim=True) for g in gradients]
        return torch.stack(units).mean(0)

    def retokenizable(self, suffixes: list[list[int]]) -> list[list[int]]:
        """The suffixes whose text tokenizes to the same ids in every prompt of the models that are
        given ids. Suffixes that end in a space are dropped, since many templates strip it."""
        pairs = list(zip(suffixes, self.lead.text(suffixes), strict=True))
        pairs = [(suffix, text) for suffix, text in pairs if text and not text[-1].isspace()]
        for losses in self._all:
            if losses.takes_ids and pairs:
                tokenized = zip(pairs, _tokenized(losses, [t for _, t in pairs]), strict=True)
                pairs = [pair for pair, ids in tokenized if ids == losses.slot.context(pair[0])]
        return [suffix for suffix, _ in pairs]

    def _contexts(self, suffixes: list[list[int]]) -> list[tuple[Losses, list[list[int]]]]:
        texts = [] if all(losses.takes_ids for losses in self._all) else self.lead.text(suffixes)

        def contexts(losses: Losses) -> list[list[int]]:
            if losses.takes_ids:
                return [losses.slot.context(ids) for ids in suffixes]
            return _tokenized(losses, texts)

        return [(losses, contexts(losses)) for losses in self._all]


def _tokenized(losses: Losses, texts: list[str]) -> list[list[int]]:
    """The ids of the whole prompt with each suffix text."""
    slot, tokenizer = losses.slot, losses.model.template.tokenizer
    prompts = [f"{slot.head} {text}{slot.tail}" for text in texts]
    ids: list[list[int]] = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return ids


class Losses:
    """The mean cross-entropy (nats) of the target under one model and prompt, for many contexts: a
    context is the ids of the whole prompt with a suffix.

    `move` sets the current context, whose keys and values are stored (one row); other contexts are
    computed from their first token that differs. `memory` limits a forward pass, in bytes.
    `takes_ids` is whether suffixes are ids of this model's vocabulary, `reuses` whether keys and
    values can be reused. Raises LeadlineError where prompt and target do not fit the model's
    context.
    """

    def __init__(
        self, model: Surrogate, slot: Slot, memory: int | None = None, *, takes_ids: bool = True
    ) -> None:
        import torch

        self.model, self.slot, self.takes_ids = model, slot, takes_ids
        self._lm = model.weights.model
        self._target = torch.tensor(slot.target, device=self._lm.device)
        self._memory = memory or batch_memory(self._lm.device, _CPU_MIB * 2**20)
        self._context: list[int] = []
        self._fixed_cache: KeysAndValues = []  # of the tokens before the suffix
        self._cache: KeysAndValues = []  # of the current context
        context = slot.context(slot.suffix)
        length = len(context) + len(slot.target)
        if (limit := model.weights.context) and length > limit:
            raise LeadlineError(
                f"model {model.name}: prompt, suffix and target have {length} tokens, and its "
                f"context is {limit}: shorten the prompt or the target"
            )
        self.reuses = True
        self.reuses = self._reuse_agrees(context)
        self.move(context)

    def move(self, context: list[int]) -> None:
        """Make a context the current one. Its keys and values are always computed from those before
        the suffix, so that a resumed search gives bit-identical results."""
        self._context = context
        if self.reuses:
            fixed = _common(self.slot.before, context)
            self._fixed_cache = self._fixed_cache or self._extend([], context[:fixed])
            self._cache = self._extend(self._fixed_cache, context[fixed:])

    def _extend(self, cache: KeysAndValues, ids: list[int]) -> KeysAndValues:
        """Keys and values [1, heads, tokens, size] of each layer, extended by those of `ids`."""
        import torch
        from transformers import DynamicCache

        if not ids:
            return cache
        # Without a config, layers with a sliding window store all tokens too.
        extended: Any = DynamicCache()
        for n, (keys, values) in enumerate(cache):
            extended.update(keys, values, n)
        with torch.no_grad():
            inputs = torch.tensor([ids], device=self._lm.device)
            self._lm(input_ids=inputs, past_key_values=extended, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in extended.layers]

    def of(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Losses of contexts, whose lengths may differ: [len(rows)]."""
        import torch

        losses = torch.empty(len(rows))
        by_length = defaultdict(list)
        for n, row in enumerate(rows):
            # The context's last token predicts the target's first, so it is always computed.
            shared = min(_common(self._context, row), len(row) - 1) if self.reuses else 0
            by_length[len(row)].append((shared, n))
        for length, members in by_length.items():
            # Rows are grouped by the length that they share with the current context.
            members.sort()
            while members:
                start = members[0][0]
                size = self._rows(length, start)
                chunk, members = [n for _, n in members[:size]], members[size:]
                ids = torch.tensor([rows[n][start:] for n in chunk], device=self._lm.device)
                losses[chunk] = self._loss(ids, start).cpu()
        return losses

    def gradient(self) -> tuple[float, torch.Tensor]:
        """The current context's loss, and its gradient with respect to the suffix tokens as one-hot
        rows: [suffix length, vocabulary]. The suffix must be ids of this model's vocabulary."""
        import torch

        device, embed = self._lm.device, self._lm.get_input_embeddings()
        start = len(self.slot.before) if self.reuses else 0
        at, size = len(self.slot.before) - start, len(self.slot.suffix)
        ids = torch.tensor([*self._context, *self.slot.target[:-1]], device=device)[start:]
        with torch.no_grad():
            embedded = embed(ids)
        suffix = embedded[at : at + size].clone().requires_grad_()
        inputs = torch.cat([embedded[:at], suffix, embedded[at + size :]])[None]
        logits = self._logits(start, inputs_embeds=inputs)[0].float()
        loss = torch.nn.functional.cross_entropy(logits, self._target)
        (gradient,) = torch.autograd.grad(loss, suffix)
        with torch.no_grad():
            # Through the embedding module, since some models scale their embeddings.
            tokens = torch.arange(embed.weight.shape[0], device=device)
            blocks = [gradient @ embed(block).T for block in tokens.split(_VOCABULARY_BLOCK)]
        return loss.item(), torch.cat(blocks, 1).float().cpu()

    def _loss(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            target_inputs = self._target[:-1].expand(len(ids), -1)
            logits = self._logits(start, input_ids=torch.cat([ids, target_inputs], 1)).float()
            labels = self._target.expand(len(ids), -1)[..., None]
            target_logits, top = logits.gather(-1, labels), logits.amax(-1, keepdim=True)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            return (total.log_() + top - target_logits).mean((1, 2))

    def _logits(self, start: int, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [rows, target length, vocabulary] that predict the target."""
        from transformers import Cache

        past = None
        if start:
            past = Cache(layers=[_shared_layer()(k, v, start) for k, v in self._cache])
        out = self._lm(
            **inputs,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=len(self.slot.target),
        )
        logits: torch.Tensor = out.logits
        return logits

    def _rows(self, length: int, start: int) -> int:
        """How many rows fit in the memory limit of a forward pass, estimated from the activations
        of one layer and the output layer."""
        config = self._lm.config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        size, targets = self._lm.dtype.itemsize, len(self.slot.target)
        width, span = length - start + targets - 1, length + targets - 1
        head = targets * config.vocab_size * (size if size == 4 else size + 4)
        layer = size * (width * (8 * hidden + 3 * inner) + 4 * span * hidden + heads * width * span)
        return max(1, int(self._memory // (head + layer)))

    def _reuse_agrees(self, context: list[int]) -> bool:
        """Whether this model gives the same loss with reused keys and values as for the whole
        context. If it has other states, or drops some, every context is computed in full."""
        import torch

        whole = self._loss(torch.tensor([context], device=self._lm.device), 0).item()
        try:
            self.move(context)
            reused = self.of([context]).item()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            tolerance = 1e-3 if self._lm.dtype.itemsize == 4 else 0.05
            if abs(whole - reused) <= tolerance * max(1.0, whole):
                return True
            reason = f"loss {reused:.4f} instead of {whole:.4f}"
        _log.warning(
            "model %s: its keys and values cannot be reused (%s), so the search is slower",
            self.model.name,
            reason,
        )
        self._fixed_cache = self._cache = []
        return False


@cache
def _shared_layer() -> type:
    """The class of a cache layer that gives every row of a batch the keys and values of one row,
    and does not store new ones."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class SharedLayer(DynamicLayer):  # type: ignore[misc]
        def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[..., :length, :], values[..., :length, :]

        def update(
            self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            pairs = (self.keys, keys), (self.values, values)
            extended = [torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in pairs]
            return extended[0], extended[1]

    return SharedLayer


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
