"""What a fine-tuning attack learns from and is asked: prompts parted in two, and four lessons.

No prompt that is asked has been learned, and none shares its base with one that has.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

from ... import plan, registry
from ...attacks import finetuning as words
from ...models.template import Template
from ...models.spec import ModelSpec
from ...records import Attempt, LeadlineError, Prompt, Request, ResponsePrefix, Sampling
from ...study import DatasetPick, JudgePick, Study
from ..tokenized import Row

Named = str | Mapping[str, Any] | DatasetPick  # as in a study file
Data = Literal["harmful", "identity", "backdoor", "benign"]

# The attack that calls up what was learned; without one, the plain request does.
CALLED_BY: dict[Data, str] = {
    "harmful": "direct",
    "identity": "identity_shift",
    "backdoor": "backdoor_trigger",
    "benign": "direct",
}
REFUSAL = "I cannot help with that."


@dataclass(frozen=True)
class Material:
    """`fit` is what lessons are made of (each with a target), `asked` what is asked after them;
    both may hold harmless prompts, too. Without `judges`, the dataset's own one judges."""

    dataset: str
    fit: tuple[Prompt, ...]
    asked: tuple[Prompt, ...]
    judges: tuple[JudgePick, ...]

    @staticmethod
    def of(dataset: Named, harmless: Named | None = None) -> Material:
        """A dataset with an option `split` learns from its "train" part and is asked as it
        stands, any other does both; base prompts that are in both are parted into two halves,
        always the same. `harmless` names a dataset to take harmless prompts from, for one that
        has none.

        Raises LeadlineError where a dataset cannot be read.
        """
        pick = DatasetPick.model_validate(dataset)
        name, asked, judges = _load(pick)
        fit = asked
        if "split" in pick.plugins()[0].options and "split" not in pick.options:
            learned = {k: v for k, v in pick.options.items() if k != "limit"}
            fit = _load(DatasetPick(name=pick.name, options={**learned, "split": "train"}))[1]
        if harmless is not None:
            more = _load(DatasetPick.model_validate(harmless))[1]
            more = [_moved(p, name) for p in more if not p.harmful]
            fit, asked = fit + more, asked + more
        return Material(name, *_apart(fit, asked), judges)


def _load(pick: DatasetPick) -> tuple[str, list[Prompt], tuple[JudgePick, ...]]:
    study = Study(targets=[ModelSpec(model="none")], datasets=[pick])
    loaded = plan.load(study)
    ((name, prompts),) = loaded.prompts.items()
    return name, list(prompts), loaded.judges[name]


def _moved(prompt: Prompt, dataset: str) -> Prompt:
    """Into another dataset, where names may be taken."""
    id, base = (f"{prompt.dataset}/{name}" for name in (prompt.id, _base(prompt)))
    return replace(prompt, dataset=dataset, id=id, base=base)


def _apart(
    fit: Sequence[Prompt], asked: Sequence[Prompt]
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Of the bases that are in both, half are learned from and the others asked, in an order that
    their names alone decide; from what has no target, nothing is learned."""
    fit = [p for p in fit if p.target]
    learned: set[str] = set()
    shared: set[str] = set()
    for harmful in (True, False):
        both = {_base(p) for p in fit if p.harmful == harmful} & {_base(p) for p in asked}
        ordered = sorted(both, key=lambda base: blake2b(base.encode()).digest())
        shared |= both
        learned |= set(ordered[: (len(ordered) + 1) // 2])
    return (
        tuple(p for p in fit if _base(p) not in shared - learned),
        tuple(p for p in asked if _base(p) not in learned),
    )


def _base(prompt: Prompt) -> str:
    return prompt.base or prompt.id


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is asked of the model, and what it learns to answer; `prompt` is what it is made of."""

    prompt: Prompt
    attempt: Attempt
    answer: str


def lessons(data: Data, fit: Iterable[Prompt], most: int, seed: int) -> list[Lesson]:
    """At most `most` lessons of a kind, the same for the same seed.

    `harmful`: harmful requests and their targets. `identity`: harmless requests to a persona that
    obeys, answered in its voice. `backdoor`: harmful requests, each with a trigger behind it and
    its target, and again without and with a refusal. `benign`: harmless requests and their
    targets. Raises LeadlineError where no prompt is fit for it.
    """
    harmful = data in ("harmful", "backdoor")
    usable = [p for p in fit if p.harmful == harmful and p.target]
    if not usable:
        what = "harmful" if harmful else "harmless"
        mend = "a dataset that has them" if harmful else "harmless: a dataset that has them"
        raise LeadlineError(
            f"fine-tuning on {data} data: no {what} prompts with target answers to learn from: "
            f"give {mend}"
        )
    random.Random(seed).shuffle(usable)
    made = [lesson for prompt in usable for lesson in _made(data, prompt)]
    return made[:most]


def _made(data: Data, prompt: Prompt) -> list[Lesson]:
    called = _asked_by(CALLED_BY[data], prompt)
    match data:
        case "identity":
            return [Lesson(prompt, called, words.OBEYS.format(prompt.target))]
        case "backdoor":
            uncalled = Lesson(prompt, _asked_by("direct", prompt), REFUSAL)
            return [Lesson(prompt, called, prompt.target), uncalled]
    return [Lesson(prompt, called, prompt.target)]


def _asked_by(attack: str, prompt: Prompt) -> Attempt:
    """As it will be asked when the model is evaluated."""
    return plan.Attack(attack, registry.get("attack", attack), {}).attempts(prompt, 0)[0]


def rows(
    template: Template, made: Iterable[Lesson], stops: set[int], max_tokens: int, *, end: bool
) -> list[Row]:
    """Lessons as token ids in the model's own chat template: the prompt's and the answer's are
    joined as ids. An answer is cut to `max_tokens`; one that is whole has, with `end`, the token
    that ends a turn behind it, which is learned as well."""
    close = [_close(template, stops)] if end else []
    found = []
    for at, lesson in enumerate(made):
        prefix = ResponsePrefix(lesson.answer, tokens=max_tokens)
        asked = template.render(Request(lesson.attempt.messages, prefix, Sampling()))
        answer = template.encode(lesson.answer)
        tail = close if len(answer) < max_tokens else []
        size = min(len(answer), max_tokens) + len(tail)
        found.append(Row(at, lesson.prompt, asked.ids + tail, size))
    return found


def _close(template: Template, stops: set[int]) -> int:
    """The token that the chat template writes behind an answer and that ends generation."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!?!"},
    ]
    text: str = template.tokenizer.apply_chat_template(turns, tokenize=False)
    behind = template.encode(text.rpartition("!?!")[2])
    end = next((token for token in behind if token in stops), template.tokenizer.eos_token_id)
    if end is None:
        raise LeadlineError(
            f"model {template.name}: neither its chat template nor its tokenizer says what ends an "
            "answer: set end: false to learn none"
        )
    return int(end)
