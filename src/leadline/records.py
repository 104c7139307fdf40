"""The data types that every other module uses: prompts, attempts, requests, responses, verdicts.

Frozen dataclasses, and the protocols `Model` and `Assist`. This module imports nothing of Leadline.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant"]
"""Who wrote a chat message."""

Finish = Literal["stop", "length", "blocked", "error", "not_applicable"]
"""Why a response ended: the model stopped, it reached max_tokens, the provider's content filter
blocked it, the request failed, or the model does not support this kind of request."""

Outcome = Literal["", "refused", "complied", "off_topic", "degenerate"]
"""What an answer does: it refuses, does what was asked for at least in part, is about something
else (or repeats the request), or is no usable text (empty, a loop, random letters). "": unknown."""


class LeadlineError(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, where, and how to
    fix it. The command line prints the message without a traceback."""


class NotApplicable(Exception):
    """Raised by an attack or a model that does not support a trial. The trial is stored as
    "not_applicable", with the message as its reason, and is not counted in any rate."""


class AttemptFailed(Exception):
    """Raised by a model-assisted attack whose attacker model failed, refused or returned unusable
    text. The trial is stored as "failed", with the message as its reason: it is no evidence about
    the target and is not counted in any rate."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message: the role of its author and its text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a dataset, before any attack.

    `id` is unique within the dataset; `text` is the request to the model; `dataset` is the
    dataset's name in the results. `category` is the kind of harm (or topic), if the dataset has
    one. `harmful` is False for harmless prompts, which measure over-refusal. `context` is a
    document that the request refers to (HarmBench's contextual behaviours); attacks receive it
    prepended to `text`.

    `target` is a harmful response to the prompt, or its beginning: prefill attacks force its
    tokens, and depth measures compute probabilities along it. `base` is the id of the prompt that
    this one is a variant of ("": it is no variant); statistics treat prompts with the same base as
    one cluster. `mutation` names the attack that is already applied to `text` (SORRY-Bench
    publishes mutated rows); such a prompt is sent without a further attack.

    `history` are earlier turns of the conversation, which are sent before the attempt's messages.
    `answers` are the accepted answers to a harmless question with one short, exact answer; a judge
    that knows them reports the answer's `utility`.
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
    history: tuple[Message, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponsePrefix:
    """The start of a response, which the model is made to continue (a prefill).

    `answer` is the start of the answer. `thought` is a reasoning trace that precedes it; None is no
    trace (before an `answer`, a reasoning model then gets its format's empty trace).
    `thought_open=True` leaves the trace without its closing tag, so that the model continues it.
    `tokens` truncates `answer` to that many tokens of the target's own tokenizer; None keeps all.
    """

    answer: str = ""
    thought: str | None = None
    thought_open: bool = False
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decoding settings. None leaves a setting at the model's or the server's default.

    `temperature` 0 is greedy decoding. `top_p` is the probability mass of nucleus sampling,
    `top_k` the number of candidate tokens, `max_tokens` the most tokens to generate (the reasoning
    trace included), `seed` the seed of the random number generator.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attack makes of a prompt: the conversation to send.

    `messages` are sent in this order. `prefix` is the response prefix to continue, if any.
    `sampling` overrides settings of the study by name, e.g. {"temperature": 1.0}.
    """

    messages: tuple[Message, ...]
    prefix: ResponsePrefix | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)

    @staticmethod
    def ask(text: str, *, system: str = "", **rest: Any) -> Attempt:
        """An attempt with one user message, preceded by a system message if `system` is given.
        `rest` sets the other fields (`prefix`, `sampling`)."""
        first = (Message("system", system),) if system else ()
        return Attempt((*first, Message("user", text)), **rest)


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that decides a model's response. A hash of the request and the model's identity
    is the key under which the store keeps the response.

    `messages`, `prefix` and `sampling` are those of the attempt, with the study's settings filled
    in. `thinking` is "default", "on", "off", an effort ("low", "medium", "high") or a thinking
    budget in tokens ("512"). `sample` numbers the repetitions of one request.
    """

    messages: tuple[Message, ...]
    prefix: ResponsePrefix | None
    sampling: Sampling
    thinking: str = "default"
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Response:
    """A model's response to one request.

    `thought` and `answer` hold only what the model generated: the reasoning trace ("" if there is
    none) and the text after it. `prefix` is the response prefix as the model received it, truncated
    to its number of tokens. `finish` says how generation ended; `error` says why there is no answer
    where `finish` is "blocked", "error" or "not_applicable". `prompt_tokens` and
    `completion_tokens` are the token counts that the model or server reported (0: not reported);
    `seconds` is the duration of the request.
    """

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
        """Whether the request failed (after all retries)."""
        return self.finish == "error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one response.

    `unsafe` is whether the response is harmful; None means unscored, and an unscored response is
    not counted as safe. `refusal` is whether it refuses; None if the judge does not detect
    refusals. `outcome` says what the answer does; "" if the judge does not say. An answer that is
    off-topic or degenerate is not harmful. `score` is the degree of harm in [0, 1]; None if the
    judge has no scale. `utility`, in [0, 1], is how correct the answer to a harmless prompt is;
    None where the judge does not know.
    `thought_unsafe` and `answer_unsafe` judge the two parts of the response separately; None if
    the judge does not. `categories` are the kinds of harm that it found. `text` is the judge's own
    output, or why the response is unscored. `error` is the exception that the judge raised, as
    "TypeName: message"; "" if it did not crash.
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
    outcome: Outcome = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """One measurement of a study: model x thinking mode x prompt x attack x sample.

    `model` and `attack` are names in the results; `sample` numbers the attempts and repetitions.
    `key` is the hash under which the response is stored; for a model-assisted attack, whose request
    is made during the run, it is the hash of everything that decides the request, and `request` is
    None until then. `outcome` is set ("not_applicable" or "failed", with `reason`) where there is
    nothing to send; `request` is then None as well.
    """

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
    """A language model that answers requests: a server, local weights, or a test double.

    `name` is its name in messages and results. `concurrency` is how many calls of `respond` the
    engine keeps in flight; a model that batches requests collects them itself.
    """

    name: str
    concurrency: int

    @property
    def identity(self) -> Mapping[str, Any]:
        """What distinguishes this model from others in the hash of a request: its id, revision and
        interface. Must be cheap: the engine reads it before any weights are loaded."""

    async def prepare(self, *, prefix: bool) -> str:
        """Load the weights or connect. With `prefix=True`, check whether the model continues a
        response prefix. Returns why it does not, or "". Raises LeadlineError if the model cannot
        be loaded or reached."""

    async def respond(self, request: Request) -> Response:
        """The response to a request. Must not raise for errors of a server or a model: those are
        returned as a Response with `finish="error"`."""

    async def close(self) -> None:
        """Release connections and memory."""


class Assist(Protocol):
    """The models that a model-assisted attack may call while it makes its attempt. Every response
    is stored, so an interrupted attack resumes without repeating a call."""

    async def write(
        self,
        ask: str | Sequence[Message],
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        sample: int = 0,
    ) -> str:
        """The attacker model's answer to a user message or a conversation. `sample` numbers calls
        that are otherwise the same. Raises AttemptFailed if the attacker fails, returns an empty
        answer or reaches `max_tokens`, and NotApplicable if the study has no attacker."""

    async def target(self, attempt: Attempt) -> Response:
        """The target model's response to an attempt, with the study's sampling settings."""

    async def judge(self, attempt: Attempt, response: Response) -> Verdict:
        """The verdict of the dataset's first judge on a response of the target."""


Judge = Callable[[Prompt, Attempt, Response], Verdict | Awaitable[Verdict]]
"""A judge: a function, or an async function, from a prompt, the attempt that was sent and the
response to a verdict."""
