"""Prompts with their answers as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..models import reasoning
from ..models.checkpoint import Checkpoint
from ..models.template import Template, load_tokenizer
from ..records import LeadlineError, Message, Prompt, Request, ResponsePrefix, Sampling


@dataclass(frozen=True)
class Row:
    """A prompt with its answer as token ids, the last `answer` of which are the answer's."""

    at: int
    prompt: Prompt
    ids: list[int]
    answer: int


def read(
    ours: Checkpoint, theirs: Checkpoint, prompts: Iterable[Prompt], max_tokens: int | None
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
