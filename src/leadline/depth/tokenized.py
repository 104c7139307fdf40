"""Prompts and their answers as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..models import reasoning
from ..models.checkpoint import Checkpoint
from ..models.template import Template, load_tokenizer
from ..records import LeadlineError, Message, Prompt, Request, ResponsePrefix, Sampling


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt and its answer as one list of token ids; the last `answer` ids are the answer.
    `index` is the position of the prompt in the input."""

    index: int
    prompt: Prompt
    ids: list[int]
    answer: int

    @property
    def base(self) -> str:
        """The id of the base prompt, by which intervals are clustered."""
        return self.prompt.base or self.prompt.id

    def truncated(self, tokens: int) -> TokenizedPair:
        """A copy with at most `tokens` answer tokens."""
        removed = max(0, self.answer - tokens)
        ids = self.ids[: len(self.ids) - removed]
        return TokenizedPair(self.index, self.prompt, ids, self.answer - removed)


def tokenize_pairs(
    model: Checkpoint, reference: Checkpoint, prompts: Iterable[Prompt], max_tokens: int | None
) -> tuple[list[TokenizedPair], int | None]:
    """Prompts with their target answers, tokenized for two models that are to be compared.

    Returns a pair for each prompt, in the chat template of `model`, with at most `max_tokens`
    tokens of the target; and the number of token ids that both vocabularies share, if one of them
    has additional tokens at its end (None: the vocabularies are equal).

    Raises LeadlineError where the vocabularies differ otherwise, the two tokenizers tokenize a
    prompt differently, a prompt has no target answer, or there is no prompt.
    """
    if max_tokens is not None and max_tokens < 1:
        raise LeadlineError(f"max_tokens is {max_tokens}: give 1 or more, or leave it out")
    template = Template.load(model.path, revision=model.pinned)
    other = Template(load_tokenizer(reference.path, reference.pinned), reasoning.get("none"))
    ids, other_ids = template.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    both, fix = f"{model.name} and {reference.name}", "compare models with the same tokenizer"
    different = ids.items() ^ other_ids.items()
    shared = min((id for _, id in different), default=None)
    if shared is not None and shared < min(len(ids), len(other_ids)):
        token = min(token for token, _ in different)
        values = " and ".join(str(known.get(token, "missing")) for known in (ids, other_ids))
        raise LeadlineError(
            f"{both} have different vocabularies ({len(ids)} and {len(other_ids)} tokens; "
            f"the id of {token!r} is {values}): {fix}"
        )
    pairs = []
    for index, prompt in enumerate(prompts):
        messages = (*prompt.history, Message("user", prompt.text))
        request = Request(messages, ResponsePrefix(prompt.target), Sampling())
        before = template.render(request).text.removesuffix(prompt.target)
        parts = [template.encode(text) for text in (before, prompt.target)]
        if not parts[1]:
            raise LeadlineError(
                f"prompt {prompt.id} of {prompt.dataset} has no target answer, which this measure "
                "needs: add one to the dataset, or leave the prompt out"
            )
        if parts != [other.encode(text) for text in (before, prompt.target)]:
            raise LeadlineError(f"{both} tokenize prompt {prompt.id} differently: {fix}")
        answer = parts[1][:max_tokens]
        pairs.append(TokenizedPair(index, prompt, parts[0] + answer, len(answer)))
    if not pairs:
        raise LeadlineError(f"no prompts to compare {both} on: give prompts with target answers")
    return pairs, shared


def check_context(
    name: str, pairs: Iterable[TokenizedPair], context: int | None, spare: int = 0
) -> None:
    """Raises LeadlineError for a pair that is longer than a model's context. The last `spare` ids
    of a pair do not count: the model does not read them."""
    longest = max(pairs, key=lambda pair: len(pair.ids))
    if context is not None and len(longest.ids) - spare > context:
        raise LeadlineError(
            f"prompt {longest.prompt.id} with its answer has {len(longest.ids)} tokens, and the "
            f"context of {name} is {context}: leave the prompt out, or set a lower max_tokens"
        )


def batches(pairs: Iterable[TokenizedPair], batch_tokens: int) -> Iterator[list[TokenizedPair]]:
    """Batches of at most `batch_tokens` tokens (including padding) or one pair. The longest come
    first, so that a batch that does not fit in memory fails at once."""
    batch: list[TokenizedPair] = []
    for pair in sorted(pairs, key=lambda pair: -len(pair.ids)):
        if batch and len(batch[0].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(pair)
    yield batch
