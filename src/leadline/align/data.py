"""Training data: read from files or datasets, and validated before training starts.

    Triplet   {"prompt", "harmful", "refusal"}: a harmful answer, and the refusal to learn
    Dialogue  {"prompt", "completion"} or {"messages"}: the answer to learn

A prompt is a string (one user turn) or a list of messages. Errors name the file and the row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ..datasets.tables import rows
from ..models.template import Template
from ..records import LeadlineError, Message, NotApplicable, Role
from ..registry import unknown
from ..text import is_name, outline
from .turns import TurnFormat

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Triplet:
    """A harmful prompt, a harmful answer to it, and a refusal ("" where it is still to be
    generated). `where` is the file and row that it comes from, for error messages."""

    prompt: Messages
    harmful: str
    refusal: str = ""
    where: str = ""

    def row(self) -> dict[str, Any]:
        """The row in RecoveryTrainer's format."""
        return {"prompt": _to_dicts(self.prompt), "harmful": self.harmful, "refusal": self.refusal}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt and the answer to learn ("" where it is still to be generated). `where` is the file
    and row that it comes from, for error messages. The end of a `truncated` answer is not learned.
    """

    prompt: Messages
    answer: str = ""
    where: str = ""
    truncated: bool = False

    def row(self) -> dict[str, Any]:
        """The row in TRL's conversational prompt-completion format; RecoveryTrainer also reads the
        column `truncated`."""
        completion = Message("assistant", self.answer)
        row: dict[str, Any] = {
            "prompt": _to_dicts(self.prompt),
            "completion": _to_dicts([completion]),
        }
        return row | ({"truncated": True} if self.truncated else {})


def read_harmful(path: str | Path) -> list[Triplet]:
    """Triplets from a JSONL, JSON, CSV or Parquet file. The column `refusal` may be missing or
    empty; such refusals are to be generated. Raises LeadlineError for the first invalid row."""
    return [triplet(row.cells, row.where, generate=True) for row in rows(str(path), None)]


def read_utility(path: str | Path) -> list[Dialogue]:
    """Harmless dialogues. Answers may be missing; they are to be generated. Raises LeadlineError
    for the first invalid row."""
    return [dialogue(row.cells, row.where, generate=True) for row in rows(str(path), None)]


def read_training(path: str | Path) -> list[Dialogue]:
    """Dialogues for fine-tuning, each with its answer. Raises LeadlineError for the first invalid
    row."""
    return [dialogue(row.cells, row.where) for row in rows(str(path), None)]


def triplet(cells: Mapping[str, Any], where: str, *, generate: bool = False) -> Triplet:
    """Validate one row. With `generate`, its refusal may be missing. Raises LeadlineError."""
    cells = _filled(cells)
    optional = ("refusal",)
    required = ("prompt", "harmful") if generate else ("prompt", "harmful", *optional)
    _check_columns(cells, where, required, optional)
    return Triplet(
        _prompt(cells["prompt"], where),
        _text(cells["harmful"], where, "column 'harmful'"),
        _text(cells.get("refusal", ""), where, "column 'refusal'", empty=generate),
        where,
    )


def dialogue(cells: Mapping[str, Any], where: str, *, generate: bool = False) -> Dialogue:
    """Validate one row. With `generate`, its answer may be missing. In `messages` the last answer
    is the one to learn; earlier ones are part of its prompt. Raises LeadlineError."""
    cells = _filled(cells)
    if "messages" in cells:
        messages = _messages(cells["messages"], where, "messages")
        if all(message.role != "assistant" for message in messages) and not generate:
            raise LeadlineError(
                f"{where}: no assistant turn, so nothing to learn: add the answer or remove the row"
            )
        if messages[-1].role == "assistant":
            prompt = _check_order(messages[:-1], where)
            return Dialogue(prompt, _text(messages[-1].content, where, "the answer"), where)
        if not generate:
            raise LeadlineError(
                f"{where}: the last turn is the {messages[-1].role}'s: end with the assistant's "
                "answer"
            )
        return Dialogue(_check_order(messages, where), "", where)
    if "text" in cells and "prompt" not in cells:
        raise LeadlineError(
            f"{where}: in a column 'text' the start of the answer is not known: use 'messages', or "
            "'prompt' and 'completion'"
        )
    optional = ("completion",)
    required = ("prompt",) if generate else ("prompt", *optional)
    _check_columns(cells, where, required, (*optional, "messages"))
    answer = cells.get("completion", "")
    if isinstance(answer, list):
        turns = _messages(answer, where, "completion")
        if [turn.role for turn in turns] != ["assistant"]:
            raise LeadlineError(f"{where}: a completion is one assistant turn, not {len(turns)}"
                                f" ({', '.join(turn.role for turn in turns)})")  # fmt: skip
        answer = turns[0].content
    answer = _text(answer, where, "column 'completion'", empty=generate)
    truncated = cells.get("truncated") is True
    return Dialogue(_prompt(cells["prompt"], where), answer, where, truncated)


def check_lengths(
    rows: Iterable[Triplet | Dialogue], template: Template, max_length: int | None
) -> None:
    """Raise LeadlineError for the first row whose prompt and answer (of a triplet: the refusal)
    have more than `max_length` tokens, or that the chat template rejects."""
    turns = TurnFormat.of(template)
    for row in rows:
        encode(row, turns, max_length)


def fitting(rows: Iterable[Dialogue], template: Template, max_length: int | None) -> list[Dialogue]:
    """The rows that `check_lengths` accepts."""
    turns, kept = TurnFormat.of(template), []
    for row in rows:
        with suppress(LeadlineError):
            encode(row, turns, max_length)
            kept.append(row)
    return kept


def encode(
    row: Triplet | Dialogue, turns: TurnFormat, max_length: int | None
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the context, of the harmful answer (of a dialogue: []), truncated so that the
    row fits in `max_length`, and of the answer with the end of its turn, if it is not truncated.
    Raises LeadlineError where context and answer alone do not fit."""
    start, answer = (row.harmful, row.refusal) if isinstance(row, Triplet) else ("", row.answer)
    if isinstance(row, Dialogue) and row.truncated:
        turns = replace(turns, end="")
    try:
        context, harmful, learned = turns.tokenize(row.prompt, start, answer)
    except NotApplicable as error:
        raise LeadlineError(f"{row.where}: {error}: fix or remove the row") from error
    size = len(context) + len(learned)
    if max_length is None:
        return context, harmful, learned
    if size > max_length:
        raise LeadlineError(
            f"{row.where}: its prompt and {'refusal' if start else 'answer'} have {size} tokens, "
            f"and max_length is {max_length}: shorten or remove the row, or raise max_length"
        )
    return context, harmful[: max_length - size], learned


def _to_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _filled(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Without missing cells, which table formats represent as null or NaN."""
    return {k: v for k, v in cells.items() if v is not None and v == v}


def _check_columns(
    cells: Mapping[str, Any], where: str, required: Sequence[str], optional: Sequence[str]
) -> None:
    known = {*required, *optional}
    for column in required:
        if column in cells:
            continue
        others = [name for name in cells if is_name(name) and name not in known]
        near = difflib.get_close_matches(column, others, n=1, cutoff=0.5)
        hint = f": {unknown('column', near[0], known)}" if near else (
            f", among {', '.join(map(outline, cells)) or 'none'}: add it, or rename one to it"
        )  # fmt: skip
        raise LeadlineError(f"{where}: no column {column!r}{hint}")


def _text(value: Any, where: str, what: str, *, empty: bool = False) -> str:
    """The value, where it is valid text; `what` names it in errors. Whitespace alone is ""."""
    if value is None:
        raise LeadlineError(f"{where}: {what} is null: fill it or remove the row")
    if not isinstance(value, str):
        raise LeadlineError(f"{where}: {what} has type {type(value).__name__}: write it as text")
    if not value.strip() and not empty:
        raise LeadlineError(f"{where}: {what} is empty: fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LeadlineError(
            f"{where}: {what} contains an unpaired surrogate: fix its encoding"
        ) from error
    return value if value.strip() else ""


def _prompt(value: Any, where: str) -> Messages:
    if isinstance(value, list):
        return _check_order(_messages(value, where, "prompt"), where)
    return (Message("user", _text(value, where, "column 'prompt'")),)


def _messages(value: Any, where: str, column: str) -> Messages:
    fix = 'write [{"role": "user", "content": "..."}, ...]'
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise LeadlineError(f"{where}: column {column!r} is not a list of messages: {fix}")
    if not value:
        raise LeadlineError(f"{where}: column {column!r} has no turns: fill it or remove the row")
    roles, messages = get_args(Role), []
    for turn in value:
        missing = {"role", "content"} - turn.keys()
        if missing:
            raise LeadlineError(f"{where}: a message has no {sorted(missing)[0]!r}: {fix}")
        if turn["role"] not in roles:
            raise LeadlineError(
                f"{where}: unknown role ({outline(turn['role'])}): valid names are "
                f"{', '.join(roles)}"
            )
        if turn.get("tool_calls"):
            raise LeadlineError(
                f"{where}: a message has tool calls, which are not supported: remove the row or "
                "its 'tool_calls'"
            )
        content = _text(turn["content"], where, f"the {turn['role']} turn", empty=True)
        messages.append(Message(turn["role"], content))
    return tuple(messages)


def _check_order(prompt: Messages, where: str) -> Messages:
    """The prompt, where its turns are in order: an optional system turn, then user and assistant
    in alternation, the user first and last."""
    turns = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    roles = [turn.role for turn in turns]
    expected = ["user" if n % 2 == 0 else "assistant" for n in range(len(roles))]
    if roles != expected or not roles or roles[-1] != "user":
        raise LeadlineError(
            f"{where}: roles out of order before the answer "
            f"({', '.join(turn.role for turn in prompt) or 'none'}): after an optional system "
            "turn, alternate user and assistant turns, the user first and last"
        )
    for turn in turns:
        _text(turn.content, where, f"the {turn.role} turn")
    return prompt
