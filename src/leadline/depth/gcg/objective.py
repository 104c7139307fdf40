"""The loss of suffixes: the expensive part of a GCG search, computed exactly.

Keys and values of tokens that do not change are computed once and shared by all candidates, a
candidate is computed from its first changed token, and the output layer runs on the positions of
the target only.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ...records import LeadlineError, Prompt
from .surrogate import Slot, Surrogate

if TYPE_CHECKING:
    import torch

    from .config import GCGConfig

    Kept = list[tuple[torch.Tensor, torch.Tensor]]

_VOCABULARY_BLOCK = 8192
_CPU_MIB = 32  # larger buffers are returned to the system and allocated again for each forward
_log = logging.getLogger("leadline")


class Objective:
    """The mean target loss over models and prompts, of suffixes in the vocabulary of `lead`.

    Models that tokenize the suffix as the lead model does read its ids, other models its text.
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
                [Losses(model, s, memory, own=same and s.suffix == self.start) for s in slots]
            )
        self._all = [one for losses in self._models for one in losses]

    def text(self, suffix: list[int]) -> str:
        """A suffix as text."""
        return self.lead.text([suffix])[0]

    def move(self, suffix: list[int]) -> None:
        """Make a suffix the current one: its gradient is taken, its keys and values are kept."""
        for losses, (context,) in self._contexts([suffix]):
            losses.move(context)

    def of(self, suffixes: list[list[int]]) -> torch.Tensor:
        """The losses of suffixes: [len(suffixes)]."""
        import torch

        found = [losses.of(contexts) for losses, contexts in self._contexts(suffixes)]
        return torch.stack(found).mean(0)

    def gradient(self) -> torch.Tensor:
        """The gradient of the current suffix's loss: [suffix length, vocabulary].

        The mean over prompts. With several models, gradients are normalised at each position, so
        that every model has the same weight.
        """
        import torch

        own = [[one for one in losses if one.own] for losses in self._models]
        found = [torch.stack([o.gradient()[1] for o in some]).mean(0) for some in own if some]
        if len(found) == 1:
            return found[0]
        width = min(gradient.shape[1] for gradient in found)
        units = [g[:, :width] / g.norm(dim=1, keepdim=True) for g in found]
        return torch.stack(units).mean(0)

    def kept(self, suffixes: list[list[int]]) -> list[list[int]]:
        """The suffixes whose text tokenizes to the same ids in every prompt (of models that read
        ids). Suffixes that end in a space are dropped, since many templates strip it."""
        pairs = list(zip(suffixes, self.lead.text(suffixes), strict=True))
        pairs = [(suffix, text) for suffix, text in pairs if text and not text[-1].isspace()]
        for one in self._all:
            if one.own and pairs:
                read = _read(one, [text for _, text in pairs])
                both = zip(pairs, read, strict=True)
                pairs = [pair for pair, ids in both if ids == one.slot.context(pair[0])]
        return [suffix for suffix, _ in pairs]

    def _contexts(self, suffixes: list[list[int]]) -> list[tuple[Losses, list[list[int]]]]:
        texts = [] if all(one.own for one in self._all) else self.lead.text(suffixes)
        return [
            (one, [one.slot.context(ids) for ids in suffixes] if one.own else _read(one, texts))
            for one in self._all
        ]


def _read(losses: Losses, texts: list[str]) -> list[list[int]]:
    slot, tokenizer = losses.slot, losses.model.template.tokenizer
    whole = [f"{slot.head} {text}{slot.tail}" for text in texts]
    ids: list[list[int]] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids


class Losses:
    """The mean cross-entropy of the target under one model and prompt, for many contexts.

    `move` sets the current context, whose keys and values are kept (one row); other contexts are
    computed from their first token that differs. `memory` is in bytes. `own` means that suffixes
    are given as ids of this model's vocabulary.
    """

    def __init__(
        self, model: Surrogate, slot: Slot, memory: int | None = None, *, own: bool = True
    ) -> None:
        import torch

        self.model, self.slot, self.own = model, slot, own
        self._lm = model.weights.model
        self._target = torch.tensor(slot.target, device=self._lm.device)
        self._memory = memory or _free_memory(self._lm.device)
        self._context: list[int] = []
        self._before: Kept = []
        self._kept: Kept = []
        context = slot.context(slot.suffix)
        length = len(context) + len(slot.target)
        if (most := model.weights.context) and length > most:
            raise LeadlineError(
                f"model {model.name}: prompt, suffix and target are {length} tokens and its "
                f"context {most}: shorten the prompt or the target"
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
            self._before = self._before or self._extend([], context[:fixed])
            self._kept = self._extend(self._before, context[fixed:])

    def _extend(self, kept: Kept, ids: list[int]) -> Kept:
        """Keys and values [1, heads, tokens, size] of each layer, extended by those of `ids`."""
        import torch
        from transformers import DynamicCache

        if not ids:
            return kept
        extended: Any = (
            DynamicCache()
        )  # without a config, sliding window layers keep everything too
        for n, (keys, values) in enumerate(kept):
            extended.update(keys, values, n)
        with torch.no_grad():
            given = torch.tensor([ids], device=self._lm.device)
            self._lm(input_ids=given, past_key_values=extended, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in extended.layers]

    def of(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Losses of contexts, whose lengths may differ: [len(rows)]."""
        import torch

        losses = torch.empty(len(rows))
        by_length = defaultdict(list)
        for n, row in enumerate(rows):
            # The context's last token predicts the target's first, so it is always computed.
            same = min(_common(self._context, row), len(row) - 1) if self.reuses else 0
            by_length[len(row)].append((same, n))
        for length, members in by_length.items():
            # Rows are grouped by the length that they share with the current context.
            members.sort()
            while members:
                start = members[0][0]
                many = self._rows(length, start)
                chunk, members = [n for _, n in members[:many]], members[many:]
                ids = torch.tensor([rows[n][start:] for n in chunk], device=self._lm.device)
                losses[chunk] = self._loss(ids, start).cpu()
        return losses

    def gradient(self) -> tuple[float, torch.Tensor]:
        """The current context's loss, and its gradient with respect to the one-hot rows of the
        suffix: [suffix length, vocabulary] (the suffix must be in this model's vocabulary)."""
        import torch

        device, embed = self._lm.device, self._lm.get_input_embeddings()
        start = len(self.slot.before) if self.reuses else 0
        at, size = len(self.slot.before) - start, len(self.slot.suffix)
        ids = torch.tensor([*self._context, *self.slot.target[:-1]], device=device)[start:]
        with torch.no_grad():
            rest = embed(ids)
        suffix = rest[at : at + size].clone().requires_grad_()
        inputs = torch.cat([rest[:at], suffix, rest[at + size :]])[None]
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
            given = self._target[:-1].expand(len(ids), -1)
            logits = self._logits(start, input_ids=torch.cat([ids, given], 1)).float()
            right = self._target.expand(len(ids), -1)[..., None]
            said, top = logits.gather(-1, right), logits.amax(-1, keepdim=True)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            return (total.log_() + top - said).mean((1, 2))

    def _logits(self, start: int, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [rows, target length, vocabulary] that predict the target."""
        from transformers import Cache

        past = None
        if start:
            past = Cache(layers=[_shared()(k, v, start) for k, v in self._kept])
        out = self._lm(
            **inputs,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=len(self.slot.target),
        )
        logits: torch.Tensor = out.logits
        return logits

    def _rows(self, length: int, start: int) -> int:
        """How many rows fit into the memory of one forward: one layer and the output layer."""
        config = self._lm.config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        size, targets = self._lm.dtype.itemsize, len(self.slot.target)
        width, span = length - start + targets - 1, length + targets - 1
        head = targets * config.vocab_size * (size if size == 4 else size + 4)
        layer = size * (width * (8 * hidden + 3 * inner) + 4 * span * hidden + heads * width * span)
        return max(1, int(self._memory // (head + layer)))

    def _reuse_agrees(self, context: list[int]) -> bool:
        """Whether this architecture gives the same loss from kept keys and values as from the whole
        context. If it has other states, or drops some, every context is computed in full."""
        import torch

        whole = self._loss(torch.tensor([context], device=self._lm.device), 0).item()
        try:
            self.move(context)
            reused = self.of([context]).item()
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            near = 1e-3 if self._lm.dtype.itemsize == 4 else 0.05
            if abs(whole - reused) <= near * max(1.0, whole):
                return True
            why = f"loss {reused:.4f} instead of {whole:.4f}"
        _log.warning(
            "model %s: its keys and values cannot be reused (%s), so the search is slower",
            self.model.name,
            why,
        )
        self._before = self._kept = []
        return False


@cache
def _shared() -> type:
    """The class of a cache layer that gives every row of a batch the keys and values of one row,
    and stores nothing."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class Shared(DynamicLayer):  # type: ignore[misc]
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

    return Shared


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _free_memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return _CPU_MIB * 2**20
