"""Two models that read the same tokens: found, checked, loaded, and run up to their heads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import organism
from ..models import reasoning
from ..models._transcript import Template, commit, folder, load_tokenizer
from ..models._weights import Weights, check, fingerprint
from ..records import LeadlineError, Message, Prompt, Request, ResponsePrefix, Sampling

if TYPE_CHECKING:
    from torch import Tensor

# What configs call the numbers that their models put between head and logits. Some multiply by
# one and others divide by it, so each is tried, and the model's own logits decide.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")

_log = logging.getLogger("leadline")


@dataclass(frozen=True)
class Home:
    """Where a model lies, and what it is: a fingerprint of its folder, or a hub id's commit."""

    name: str
    path: str
    revision: str
    local: bool

    @staticmethod
    def find(name: str | Path) -> Home:
        shipped = str(name).startswith("organism:")
        home = organism.path(str(name)) if shipped else folder(name)
        if home is None:
            return Home(str(name), str(name), commit(str(name), None), False)
        check(home)
        return Home(str(name), str(home), fingerprint(home), True)

    @property
    def pinned(self) -> str | None:
        return None if self.local else self.revision


@dataclass(frozen=True)
class Row:
    """A prompt with its answer as token ids, the last `answer` of which are the answer's."""

    at: int
    prompt: Prompt
    ids: list[int]
    answer: int


def read(
    ours: Home, theirs: Home, prompts: Iterable[Prompt], max_tokens: int | None
) -> tuple[list[Row], int | None]:
    """All prompts in our chat template, which both tokenizers are shown to cut alike; and how many
    tokens they share, where one has more behind them."""
    if max_tokens is not None and max_tokens < 1:
        raise LeadlineError(f"max_tokens is {max_tokens}: give 1 or more, or leave it out")
    template = Template.load(ours.path, revision=ours.pinned)
    other = Template(load_tokenizer(theirs.path, theirs.pinned), reasoning.get("none"))
    words, others = template.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    pair, mend = f"{ours.name} and {theirs.name}", "compare models of one tokenizer"
    unlike = words.items() ^ others.items()
    shared = min((id for _, id in unlike), default=None)
    if shared is not None and shared < min(len(words), len(others)):  # not only one to pad with
        token = min(token for token, _ in unlike)
        ids = " and ".join(str(known.get(token, "missing")) for known in (words, others))
        raise LeadlineError(
            f"{pair} have different vocabularies ({len(words)} and {len(others)} tokens; "
            f"{token!r} is {ids}): {mend}"
        )
    rows = []
    for at, prompt in enumerate(prompts):
        asked = Request((Message("user", prompt.text),), ResponsePrefix(prompt.target), Sampling())
        before = template.render(asked).text.removesuffix(prompt.target)
        parts = [template.encode(text) for text in (before, prompt.target)]
        if not parts[1]:
            raise LeadlineError(
                f"prompt {prompt.id} of {prompt.dataset} has no target answer to go along: give "
                "it one in the dataset, or leave the prompt out"
            )
        if parts != [other.encode(text) for text in (before, prompt.target)]:
            raise LeadlineError(
                f"{pair} cut prompt {prompt.id} into different tokens of one vocabulary: {mend}"
            )
        answer = parts[1][:max_tokens]
        rows.append(Row(at, prompt, parts[0] + answer, len(answer)))
    if not rows:
        raise LeadlineError(f"no prompts to compare {pair} on: give prompts with target answers")
    return rows, shared


def batches(rows: Iterable[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Longest first: if one does not fit into memory, the first does not."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if batch and len(batch[0].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


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
    def load(home: Home, rows: Sequence[Row], dtype: str | None, device: str | None) -> Side:
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
