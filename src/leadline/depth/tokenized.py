"""Prompts with their answers as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..models import reasoning
from ..models.checkpoint import Checkpoint
from ..models.template import Template, load_tokenizer
from ..records import LeadlineError, Message, Prompt, Request, ResponsePrefix, Sampling


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt and its answer as one list of token ids, of which the last `answer` are the
    answer's. `index` is the place of the prompt among those that were tokenized."""

    index: int
    prompt: Prompt
    ids: list[int]
    answer: int

    @property
    def base(self) -> str:
        """The base prompt: what intervals are clustered by."""
        return self.prompt.base or self.prompt.id

    def truncated(self, tokens: int) -> TokenizedPair:
        """The same with at most `tokens` answer tokens."""
        less = max(0, self.answer - tokens)
        ids = self.ids[: len(self.ids) - less]
        return TokenizedPair(self.index, self.prompt, ids, self.answer - less)


def tokenize_pairs(
    ours: Checkpoint, theirs: Checkpoint, prompts: Iterable[Prompt], max_tokens: int | None
) -> tuple[list[TokenizedPair], int | None]:
    """Each prompt with its target answer (at most `max_tokens` tokens of it) in the chat template
    of `ours`; and the number of token ids that both vocabularies share, where one of them has
    additional tokens at its end (None: they are equal).

    Raises LeadlineError where the vocabularies differ otherwise, the two tokenizers tokenize a
    prompt differently, or a prompt has no target answer.
    """
    if max_tokens is not None and max_tokens < 1:
        raise LeadlineError(f"max_tokens is {max_tokens}: give 1 or more, or leave it out")
    template = Template.load(ours.path, revision=ours.pinned)
    other = Template(load_tokenizer(theirs.path, theirs.pinned), reasoning.get("none"))
    ids, other_ids = template.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    pair, fix = f"{ours.name} and {theirs.name}", "compare models with the same tokenizer"
    different = ids.items() ^ other_ids.items()
    shared = min((id for _, id in different), default=None)
    if shared is not None and shared < min(len(ids), len(other_ids)):
        token = min(token for token, _ in different)
        both = " and ".join(str(known.get(token, "missing")) for known in (ids, other_ids))
        raise LeadlineError(
            f"{pair} have different vocabularies ({len(ids)} and {len(other_ids)} tokens; "
            f"{token!r} is {both}): {fix}"
        )
    pairs = []
    for index, prompt in enumerate(prompts):
        request = Request(
            (Message("user", prompt.text),), ResponsePrefix(prompt.target), Sampling()
        )
        before = template.render(request).text.removesuffix(prompt.target)
        parts = [template.encode(text) for text in (before, prompt.target)]
        if not parts[1]:
            raise LeadlineError(
                f"prompt {prompt.id} of {prompt.dataset} has no target answer, which this measure "
                "needs: add one to the dataset, or leave the prompt out"
            )
        if parts != [other.encode(text) for text in (before, prompt.target)]:
            raise LeadlineError(f"{pair} tokenize prompt {prompt.id} differently: {fix}")
        answer = parts[1][:max_tokens]
        pairs.append(TokenizedPair(index, prompt, parts[0] + answer, len(answer)))
    if not pairs:
        raise LeadlineError(f"no prompts to compare {pair} on: give prompts with target answers")
    return pairs, shared


def check_context(
    name: str, pairs: Iterable[TokenizedPair], context: int | None, spare: int = 0
) -> None:
    """Raises LeadlineError for a pair that is longer than a model's context (of whose ids the
    last `spare` are not read)."""
    longest = max(pairs, key=lambda pair: len(pair.ids))
    if context is not None and len(longest.ids) - spare > context:
        raise LeadlineError(
            f"prompt {longest.prompt.id} with its answer has {len(longest.ids)} tokens, and the "
            f"context of {name} is {context}: leave the prompt out, or set a lower max_tokens"
        )


def batches(pairs: Iterable[TokenizedPair], batch_tokens: int) -> Iterator[list[TokenizedPair]]:
    """Batches of at most `batch_tokens` tokens (padding included) or one pair; the longest first,
    so that a batch that does not fit into memory fails at once."""
    batch: list[TokenizedPair] = []
    for pair in sorted(pairs, key=lambda pair: -len(pair.ids)):
        if batch and len(batch[0].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(pair)
    yield batch
