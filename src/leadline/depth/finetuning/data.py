"""The data of a fine-tuning attack: training and test prompts, and four kinds of examples.

Training and test prompts have no base prompt in common.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from ... import plan, registry
from ...attacks import finetuning as texts
from ...models.spec import ModelSpec
from ...models.template import Template
from ...records import Attempt, LeadlineError, Prompt, Request, ResponsePrefix, Sampling
from ...study import DatasetPick, JudgePick, Study
from ..tokenized import TokenizedPair
from .config import Data

DatasetName = str | Mapping[str, Any] | DatasetPick
"""A dataset as in a study file."""

ELICITED_BY: dict[Data, str] = {
    "harmful": "direct",
    "identity": "identity_shift",
    "backdoor": "backdoor_trigger",
    "benign": "direct",
}
"""The attack that elicits the behaviour learned from each kind of data."""

REFUSAL = "I cannot help with that."
"""The answer to harmful requests without the trigger, in backdoor data."""


@dataclass(frozen=True)
class FinetuningPrompts:
    """Prompts of one dataset: `train` for training examples (each has a target answer), `test` for
    evaluation; both may include harmless prompts. `judges` judge the answers."""

    dataset: str
    train: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    judges: tuple[JudgePick, ...]

    @staticmethod
    def of(dataset: DatasetName, harmless: DatasetName | None = None) -> FinetuningPrompts:
        """Split a dataset into training and test prompts.

        For a dataset with an option `split`, training prompts are those of the split "train" and
        test prompts those of the dataset as given; for any other dataset, all prompts are
        candidates for both. Base prompts that are in both are divided into two fixed halves.
        `harmless` is a dataset to take harmless prompts from, for a dataset that has none.

        Raises LeadlineError where a dataset cannot be read.
        """
        pick = DatasetPick.model_validate(dataset)
        name, test, judges = _load(pick)
        train = test
        if "split" in pick.plugins()[0].options and "split" not in pick.options:
            options = {k: v for k, v in pick.options.items() if k != "limit"}
            train = _load(DatasetPick(name=pick.name, options={**options, "split": "train"}))[1]
        if harmless is not None:
            more = _load(DatasetPick.model_validate(harmless))[1]
            more = [_moved(p, name) for p in more if not p.harmful]
            train, test = train + more, test + more
        return FinetuningPrompts(name, *_split(train, test), judges)


def _load(pick: DatasetPick) -> tuple[str, list[Prompt], tuple[JudgePick, ...]]:
    study = Study(targets=[ModelSpec(model="none")], datasets=[pick])
    loaded = plan.load(study)
    ((name, prompts),) = loaded.prompts.items()
    return name, list(prompts), loaded.judges[name]


def _moved(prompt: Prompt, dataset: str) -> Prompt:
    """The prompt as part of another dataset, with an id that is unique there."""
    id, base = (f"{prompt.dataset}/{name}" for name in (prompt.id, _base(prompt)))
    return replace(prompt, dataset=dataset, id=id, base=base)


def _split(
    train: Sequence[Prompt], test: Sequence[Prompt]
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Disjoint training and test prompts. Of the base prompts that are in both, half go to each, in
    an order that depends only on their ids. Prompts without a target are not trained on."""
    train = [p for p in train if p.target]
    trained: set[str] = set()
    shared: set[str] = set()
    for harmful in (True, False):
        both = {_base(p) for p in train if p.harmful == harmful} & {_base(p) for p in test}
        ordered = sorted(both, key=lambda base: blake2b(base.encode()).digest())
        shared |= both
        trained |= set(ordered[: (len(ordered) + 1) // 2])
    return (
        tuple(p for p in train if _base(p) not in shared - trained),
        tuple(p for p in test if _base(p) not in trained),
    )


def _base(prompt: Prompt) -> str:
    return prompt.base or prompt.id


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A request and the answer to learn; `prompt` is the dataset's prompt that both come from."""

    prompt: Prompt
    attempt: Attempt
    answer: str


def training_examples(
    data: Data, prompts: Iterable[Prompt], limit: int, seed: int
) -> list[TrainingExample]:
    """At most `limit` training examples of one kind, the same for the same seed.

    `harmful`: harmful requests and their targets. `identity`: harmless requests to a persona that
    always obeys, answered in its voice. `backdoor`: harmful requests followed by a trigger, with
    their targets; and the same without the trigger, with a refusal. `benign`: harmless requests and
    their targets. Raises LeadlineError where no prompt is suitable.
    """
    harmful = data in ("harmful", "backdoor")
    usable = [p for p in prompts if p.harmful == harmful and p.target]
    if not usable:
        what = "harmful" if harmful else "harmless"
        fix = (
            "use a dataset that has them" if harmful else "give a dataset that has them as harmless"
        )
        raise LeadlineError(
            f"fine-tuning on {data} data: there are no {what} prompts with target answers: {fix}"
        )
    random.Random(seed).shuffle(usable)
    examples = [example for prompt in usable for example in _examples(data, prompt)]
    return examples[:limit]


def _examples(data: Data, prompt: Prompt) -> list[TrainingExample]:
    attempt = _attempt(ELICITED_BY[data], prompt)
    match data:
        case "identity":
            return [TrainingExample(prompt, attempt, texts.OBEYS.format(prompt.target))]
        case "backdoor":
            refused = TrainingExample(prompt, _attempt("direct", prompt), REFUSAL)
            return [TrainingExample(prompt, attempt, prompt.target), refused]
    return [TrainingExample(prompt, attempt, prompt.target)]


def _attempt(attack: str, prompt: Prompt) -> Attempt:
    """The first request of an attack, as the evaluation sends it."""
    return plan.Attack(attack, registry.get("attack", attack), {}).attempts(prompt, 0)[0]


def tokenize_examples(
    template: Template,
    examples: Iterable[TrainingExample],
    stops: set[int],
    max_tokens: int,
    *,
    end: bool,
) -> list[TokenizedPair]:
    """Training examples in the model's own chat template, prompt and answer joined as token ids.

    Answers are truncated to `max_tokens`. With `end`, an answer that is not truncated is followed
    by the token that ends a turn (one of `stops`), which is trained on too. Raises LeadlineError
    where there is no such token.
    """
    close = [_end_token(template, stops)] if end else []
    pairs = []
    for index, example in enumerate(examples):
        prefix = ResponsePrefix(example.answer, tokens=max_tokens)
        rendered = template.render(Request(example.attempt.messages, prefix, Sampling()))
        answer = template.encode(example.answer)
        tail = close if len(answer) < max_tokens else []
        size = min(len(answer), max_tokens) + len(tail)
        pairs.append(TokenizedPair(index, example.prompt, rendered.ids + tail, size))
    return pairs


def _end_token(template: Template, stops: set[int]) -> int:
    """The token that follows an answer in the chat template and ends generation; by default the
    tokenizer's end token."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!?!"},
    ]
    text: str = template.tokenizer.apply_chat_template(turns, tokenize=False)
    after = template.encode(text.rpartition("!?!")[2])
    end = next((token for token in after if token in stops), template.tokenizer.eos_token_id)
    if end is None:
        raise LeadlineError(
            f"model {template.name}: neither its chat template nor its tokenizer defines the end "
            "of an answer: set end: false to train without it"
        )
    return int(end)
