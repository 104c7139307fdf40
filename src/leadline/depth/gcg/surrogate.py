"""Models that a suffix search looks into, and where in their prompts the suffix stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.template import Template
from ...models.weights import Weights
from ...records import LeadlineError, Message, Prompt, Request, ResponsePrefix, Sampling
from ...models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

_MARK = "LEADLINE-SUFFIX-GOES-HERE"


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A loaded model whose gradients the search may use. `revision` knows its content."""

    name: str
    revision: str
    template: Template
    weights: Weights

    @staticmethod
    def load(model: str, *, dtype: str | None = None, device: str | None = None) -> Surrogate:
        """From "organism:NAME", a folder or a hub id; LeadlineError where that is no model."""
        home = Checkpoint.find(model)
        template = Template.load(home.path, revision=home.pinned)
        if not template.tokenizer.is_fast:
            raise LeadlineError(
                f"model {model}: its tokenizer does not say which text a token stands for: save "
                "it as a fast tokenizer (tokenizer.json)"
            )
        weights = Weights.load(home.path, home.pinned, dtype, device)
        weights.model.requires_grad_(False)
        return Surrogate(model, home.revision, template, weights)

    @property
    def vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self.template.tokenizer.get_vocab()
        return found

    def text(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Suffixes as text, without the space that parts them from the request."""
        decoded = self.template.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return [text.removeprefix(" ") for text in decoded]

    def forbidden(self, *, ascii_only: bool) -> torch.Tensor:
        """A mask of rows of the embedding that no suffix may hold: special and added tokens, rows
        without a token, and, with `ascii_only`, what is not printable ASCII."""
        import torch

        tokenizer, table = self.template.tokenizer, self.weights.model.get_input_embeddings()
        banned = torch.ones(table.weight.shape[0], dtype=torch.bool)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        usable = sorted(set(self.vocabulary.values()) - special)
        texts = tokenizer.batch_decode([[i] for i in usable], clean_up_tokenization_spaces=False)
        fine = [
            token
            for token, text in zip(usable, texts, strict=True)
            if not ascii_only or (text.isascii() and text.isprintable())
        ]
        banned[fine] = False
        return banned


@dataclass(frozen=True)
class Slot:
    """Where the suffix stands in one model's rendering of one prompt: text and token ids."""

    head: str
    tail: str
    before: list[int]
    suffix: list[int]
    after: list[int]
    target: list[int]

    @staticmethod
    def find(model: Surrogate, prompt: Prompt, suffix: str, target_tokens: int | None) -> Slot:
        """Raises LeadlineError for a prompt without target, and where a token holds text of the
        suffix and of what stands beside it."""
        if not prompt.target:
            raise LeadlineError(f"prompt {prompt.id}: no target to search for: give it a target")
        template = model.template
        asked = Message("user", f"{prompt.text} {_MARK}")
        prefix = ResponsePrefix(prompt.target, tokens=target_tokens)
        text = template.render(Request((asked,), prefix, Sampling())).text
        text = text.removesuffix(template.cut(prompt.target, target_tokens))
        if text.count(f" {_MARK}") != 1:
            raise LeadlineError(
                f"model {model.name}: its chat template does not write a user turn unchanged and "
                "once, so a suffix has no place in it: give another template"
            )
        head, tail = text.split(f" {_MARK}")
        start, end = len(head), len(head) + 1 + len(suffix)
        coded = template.tokenizer(
            f"{head} {suffix}{tail}", add_special_tokens=False, return_offsets_mapping=True
        )
        ids, spans = coded["input_ids"], coded["offset_mapping"]
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
        return [*self.before, *suffix, *self.after]
