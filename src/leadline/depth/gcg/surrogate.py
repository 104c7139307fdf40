"""Models whose gradients a suffix search uses, and the position of the suffix in their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.checkpoint import Checkpoint
from ...models.template import Template
from ...models.weights import Weights
from ...records import LeadlineError, Message, Prompt, Request, ResponsePrefix, Sampling

if TYPE_CHECKING:
    import torch

_MARK = "LEADLINE-SUFFIX-GOES-HERE"


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A loaded model whose gradients the search uses. `revision` identifies its weights."""

    name: str
    revision: str
    template: Template
    weights: Weights

    @staticmethod
    def load(model: str, *, dtype: str | None = None, device: str | None = None) -> Surrogate:
        """Load "organism:NAME", a folder or a hub id.

        Raises LeadlineError where it does not load or its tokenizer is not a fast one.
        """
        checkpoint = Checkpoint.find(model)
        template = Template.load(checkpoint.path, revision=checkpoint.pinned)
        if not template.tokenizer.is_fast:
            raise LeadlineError(
                f"model {model}: its tokenizer cannot return the offsets of tokens: save it as a "
                "fast tokenizer (tokenizer.json)"
            )
        weights = Weights.load(checkpoint.path, checkpoint.pinned, dtype, device)
        weights.model.requires_grad_(False)
        return Surrogate(model, checkpoint.revision, template, weights)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token ids by token."""
        vocabulary: dict[str, int] = self.template.tokenizer.get_vocab()
        return vocabulary

    def text(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Suffixes (ids) as text, without the space between request and suffix."""
        decoded = self.template.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return [text.removeprefix(" ") for text in decoded]

    def forbidden(self, *, ascii_only: bool) -> torch.Tensor:
        """A mask over the rows of the embedding, [rows], true for tokens that no suffix may
        contain: special and added tokens, rows without a token, and with `ascii_only` all but
        printable ASCII."""
        import torch

        tokenizer, table = self.template.tokenizer, self.weights.model.get_input_embeddings()
        mask = torch.ones(table.weight.shape[0], dtype=torch.bool)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        usable = sorted(set(self.vocabulary.values()) - special)
        texts = tokenizer.batch_decode([[i] for i in usable], clean_up_tokenization_spaces=False)
        allowed = [
            token
            for token, text in zip(usable, texts, strict=True)
            if not ascii_only or (text.isascii() and text.isprintable())
        ]
        mask[allowed] = False
        return mask


@dataclass(frozen=True)
class Slot:
    """The position of the suffix in one rendered prompt: the text (`head`, `tail`) and token ids
    (`before`, `after`) around it, the ids of the suffix, and those of the target answer."""

    head: str
    tail: str
    before: list[int]
    suffix: list[int]
    after: list[int]
    target: list[int]

    @staticmethod
    def find(model: Surrogate, prompt: Prompt, suffix: str, target_tokens: int | None) -> Slot:
        """Render a prompt with a suffix, and locate the suffix.

        Raises LeadlineError for a prompt without a target, a chat template that changes the
        prompt, and a token that overlaps both the suffix and the text next to it.
        """
        if not prompt.target:
            raise LeadlineError(
                f"prompt {prompt.id}: GCG needs a target answer: add one to the dataset"
            )
        template = model.template
        message = Message("user", f"{prompt.text} {_MARK}")
        prefix = ResponsePrefix(prompt.target, tokens=target_tokens)
        text = template.render(Request((message,), prefix, Sampling())).text
        text = text.removesuffix(template.cut(prompt.target, target_tokens))
        if text.count(f" {_MARK}") != 1:
            raise LeadlineError(
                f"model {model.name}: its chat template does not render a user turn unchanged and "
                "exactly once, so the suffix cannot be located: use another template"
            )
        head, tail = text.split(f" {_MARK}")
        start, end = len(head), len(head) + 1 + len(suffix)
        encoded = template.tokenizer(
            f"{head} {suffix}{tail}", add_special_tokens=False, return_offsets_mapping=True
        )
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        inside = [n for n, (a, b) in enumerate(spans) if start < b and a < end and a < b]
        if not inside or spans[inside[0]][0] < start or spans[inside[-1]][1] > end:
            raise LeadlineError(
                f"model {model.name}: the initial suffix {suffix!r} shares a token with the text "
                "around it: give another initial suffix"
            )
        first, last = inside[0], inside[-1] + 1
        target = template.encode(prompt.target)[:target_tokens]
        return Slot(head, tail, ids[:first], ids[first:last], ids[last:], target)

    def context(self, suffix: Sequence[int]) -> list[int]:
        """The ids of the whole prompt with a suffix."""
        return [*self.before, *suffix, *self.after]
