"""The words that everything else speaks: prompt, attempt, request, response, verdict, trial.

Frozen dataclasses and two protocols; this file imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "blocked", "error", "not_applicable"]


class LeadlineError(Exception):
    """Something the user can mend. The message is one line: what, where, the mend."""


class NotApplicable(Exception):
    """Raised by an attack or a model for a trial that cannot be: it is stored with its reason."""


class AttemptFailed(Exception):
    """Raised by a model-assisted attack whose attacker failed, refused or garbled: the trial has
    failed, with this reason, and says nothing about the target."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a dataset.

    `target` is a harmful answer to it, or the start of one: what prefill attacks put into the
    model's mouth and what divergence is measured along. `base` names the prompt that this one is
    a variant of (statistics cluster by it), `mutation` the attack that the text already carries
    (SORRY-Bench ships its rows mutated).
    """

    id: str
    text: str
    dataset: str
    category: str = ""
    harmful: bool = True
    context: str = ""
    target: str = ""
    base: str = ""
    mutation: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ResponsePrefix:
    """What is put into the model's mouth: a thought part, an answer part, or both.

    `tokens` keeps only that many tokens of `answer`, counted by the target's own tokenizer.
    `thought_open` leaves the thought unfinished, for the model to go on thinking.
    """

    answer: str = ""
    thought: str | None = None
    thought_open: bool = False
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decoding settings. temperature 0 is greedy; None leaves a setting to the model."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attack makes of a prompt. `sampling` overrides the study's settings by name."""

    messages: tuple[Message, ...]
    prefix: ResponsePrefix | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)

    @staticmethod
    def ask(text: str, *, system: str = "", **rest: Any) -> Attempt:
        """One user turn, after a system turn if there is one."""
        first = (Message("system", system),) if system else ()
        return Attempt((*first, Message("user", text)), **rest)


@dataclass(frozen=True, slots=True)
class Request:
    """All that a model is told; with the model's identity it decides the trial's key."""

    messages: tuple[Message, ...]
    prefix: ResponsePrefix | None
    sampling: Sampling
    thinking: str = "default"
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Response:
    """What came back. `error` says why there is no answer (finish "blocked", "error" or
    "not_applicable"). `prefix` is the response prefix as the model received it (cut to its
    tokens); `thought` and `answer` hold only what the model wrote after it."""

    answer: str
    thought: str = ""
    finish: Finish = "stop"
    error: str = ""
    prefix: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.finish == "error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's finding about one response. `unsafe` is None where it could not be scored.

    `score` is harm in [0, 1]; `utility` in [0, 1] is how right the answer to a harmless prompt
    is, where that can be known. `text` holds the judge's own words, or why the response is unscored; `error`
    is the exception that the judge raised, if it crashed.
    """

    unsafe: bool | None
    refusal: bool | None = None
    score: float | None = None
    utility: float | None = None
    thought_unsafe: bool | None = None
    answer_unsafe: bool | None = None
    categories: tuple[str, ...] = ()
    text: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """One cell: model x thinking x prompt x attack x sample. Where there is nothing to ask, the
    request is None, `outcome` is "not_applicable" or "failed", and `reason` says why."""

    model: str
    thinking: str
    prompt: Prompt
    attack: str
    sample: int
    attempt: Attempt
    request: Request | None
    key: bytes = b""
    outcome: str = ""
    reason: str = ""


class Model(Protocol):
    """Anything that answers. One method does the work; the engine keeps `concurrency` calls of
    it in flight, and a model that batches gathers them itself."""

    name: str
    concurrency: int

    @property
    def identity(self) -> Mapping[str, Any]:
        """What enters a trial's key: id, revision, interface. Cheap: loads no weights."""

    async def prepare(self, *, prefix: bool) -> str:
        """Load or connect. With `prefix`, find out whether a response prefix is continued.
        Returns why prefixes are not applicable here, or ''."""

    async def respond(self, request: Request) -> Response:
        """Never raises for what a server or a model does: a failure is a Response."""

    async def close(self) -> None: ...


class Assist(Protocol):
    """What a model-assisted attack may ask while it makes its attempt. Each call is asked once
    and kept in the store, so that an attack that was stopped goes on in the middle."""

    async def write(
        self,
        ask: str | Sequence[Message],
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        sample: int = 0,
    ) -> str:
        """The attacker model's text. Raises AttemptFailed where it fails, says nothing or is cut
        off, NotApplicable where the study names no attacker."""

    async def target(self, attempt: Attempt) -> Response:
        """The target's answer to an attempt, with the study's sampling settings."""

    async def judge(self, attempt: Attempt, response: Response) -> Verdict:
        """The verdict of the dataset's first judge."""


Judge = Callable[[Prompt, Attempt, Response], Verdict | Awaitable[Verdict]]
