"""The data of alignment: read from files or data sets, and checked before anything is trained.

    harmful   {"prompt", "harmful", "refusal"}: a harmful answer, and the refusal to come back to
    dialogue  {"prompt", "completion"} or {"messages"}: an answer to learn

A prompt is a text (one user turn) or a list of messages. Whatever is wrong is said with the file
and the row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..datasets.tables import rows
from ..models.template import Template
from ..records import LeadlineError, Message, NotApplicable, Role
from ..registry import unknown
from ._turns import Turns

Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Triplet:
    """A harmful prompt, a harmful answer to it, and a refusal ("" where it is still to be
    generated). `where` is the row that it comes from."""

    prompt: Prompt
    harmful: str
    refusal: str = ""
    where: str = ""

    def row(self) -> dict[str, Any]:
        """As RecoveryTrainer reads it."""
        return {"prompt": _plain(self.prompt), "harmful": self.harmful, "refusal": self.refusal}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt and the answer to learn ("" where it is still to be generated)."""

    prompt: Prompt
    answer: str = ""
    where: str = ""

    def row(self) -> dict[str, Any]:
        """In TRL's conversational prompt-completion format."""
        return {"prompt": _plain(self.prompt), "completion": _plain([self.said])}

    @property
    def said(self) -> Message:
        return Message("assistant", self.answer)


def read_harmful(path: str | Path) -> list[Triplet]:
    """Triplets from JSONL, JSON, CSV or Parquet. The column `refusal` may be missing or empty:
    such refusals are to be generated. Raises LeadlineError for the first fault."""
    return [triplet(row.cells, row.where, generate=True) for row in rows(str(path), None)]


def read_utility(path: str | Path) -> list[Dialogue]:
    """Harmless dialogues, some or all of which may be prompts whose answers are to be generated.
    Raises LeadlineError for the first fault."""
    return [dialogue(row.cells, row.where, generate=True) for row in rows(str(path), None)]


def read_training(path: str | Path) -> list[Dialogue]:
    """Dialogues to fine-tune on: each with its answer. Raises LeadlineError for the first fault."""
    return [dialogue(row.cells, row.where) for row in rows(str(path), None)]


def triplet(cells: Mapping[str, Any], where: str, *, generate: bool = False) -> Triplet:
    """One row. With `generate`, its refusal may be missing."""
    cells = _given(cells)
    may = ("refusal",)
    _columns(cells, where, ("prompt", "harmful") if generate else ("prompt", "harmful", *may), may)
    return Triplet(
        _prompt(cells["prompt"], where),
        _text(cells["harmful"], where, "harmful"),
        _text(cells.get("refusal", ""), where, "refusal", empty=generate),
        where,
    )


def dialogue(cells: Mapping[str, Any], where: str, *, generate: bool = False) -> Dialogue:
    """One row. With `generate`, its answer may be missing. In `messages` the last answer is the
    one to learn; earlier ones are part of its prompt."""
    cells = _given(cells)
    if "messages" in cells:
        messages = _messages(cells["messages"], where, "messages")
        if all(message.role != "assistant" for message in messages) and not generate:
            raise LeadlineError(
                f"{where}: no assistant turn, so nothing to learn: add the answer or remove the row"
            )
        if messages[-1].role == "assistant":
            prompt, said = messages[:-1], messages[-1].content
            return Dialogue(_ordered(prompt, where), _text(said, where, "answer"), where)
        if not generate:
            raise LeadlineError(
                f"{where}: the last turn is the {messages[-1].role}'s: end with the assistant's "
                "answer"
            )
        return Dialogue(_ordered(messages, where), "", where)
    if "text" in cells and "prompt" not in cells:
        raise LeadlineError(
            f"{where}: a 'text' does not say where the answer begins: use 'messages', or 'prompt' "
            "and 'completion'"
        )
    may = ("completion",)
    _columns(cells, where, ("prompt",) if generate else ("prompt", *may), (*may, "messages"))
    answer = cells.get("completion", "")
    if isinstance(answer, list):
        turns = _messages(answer, where, "completion")
        if [turn.role for turn in turns] != ["assistant"]:
            raise LeadlineError(f"{where}: a completion is one assistant turn, not {len(turns)}"
                                f" ({', '.join(turn.role for turn in turns)})")  # fmt: skip
        answer = turns[0].content
    answer = _text(answer, where, "completion", empty=generate)
    return Dialogue(_prompt(cells["prompt"], where), answer, where)


def check_window(
    rows: Iterable[Triplet | Dialogue], template: Template, max_length: int | None
) -> None:
    """Raises LeadlineError for the first row whose prompt and answer (of a triplet: the refusal)
    have more than `max_length` tokens, or that the chat template does not take."""
    turns = Turns.of(template)
    for row in rows:
        encode(row, turns, max_length)


def encode(
    row: Triplet | Dialogue, turns: Turns, max_length: int | None
) -> tuple[list[int], list[int], list[int]]:
    """Token ids: what stands before the answer; as much of the harmful answer as fits into the
    window; the answer with the end of its turn. Raises LeadlineError where it does not fit."""
    start, answer = (row.harmful, row.refusal) if isinstance(row, Triplet) else ("", row.answer)
    try:
        context, harmful, learned = turns.split(row.prompt, start, answer)
    except NotApplicable as error:
        raise LeadlineError(f"{row.where}: {error}: mend or remove the row") from error
    size = len(context) + len(learned)
    if max_length is None:
        return context, harmful, learned
    if size > max_length:
        raise LeadlineError(
            f"{row.where}: its prompt and {'refusal' if start else 'answer'} have {size} tokens, "
            f"and the window holds {max_length}: shorten or remove the row, or raise max_length"
        )
    return context, harmful[: max_length - size], learned


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _given(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Without the cells that a table format fills up: a missing one is null, or not a number."""
    return {k: v for k, v in cells.items() if v is not None and v == v}


def _columns(
    cells: Mapping[str, Any], where: str, needs: Sequence[str], may: Sequence[str]
) -> None:
    known = {*needs, *may}
    for column in needs:
        if column in cells:
            continue
        spare = [str(name) for name in cells if name not in known]
        near = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
        found = f": {unknown('column', near[0], known)}" if near else (
            f", among {', '.join(map(repr, cells)) or 'none'}: add it, or rename one to it"
        )  # fmt: skip
        raise LeadlineError(f"{where}: no column {column!r}{found}")


def _text(value: Any, where: str, what: str, *, empty: bool = False) -> str:
    if value is None:
        raise LeadlineError(f"{where}: the {what} is null: fill it or remove the row")
    if not isinstance(value, str):
        raise LeadlineError(f"{where}: the {what} is a {type(value).__name__}: write it as text")
    if not value.strip() and not empty:
        raise LeadlineError(f"{where}: the {what} is empty: fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LeadlineError(
            f"{where}: the {what} holds half of a surrogate pair: mend that text"
        ) from error
    return value if value.strip() else ""


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, list):
        return _ordered(_messages(value, where, "prompt"), where)
    return (Message("user", _text(value, where, "prompt")),)


def _messages(value: Any, where: str, what: str) -> Prompt:
    mend = 'write [{"role": "user", "content": "..."}, ...]'
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise LeadlineError(f"{where}: the {what} is no list of messages: {mend}")
    if not value:
        raise LeadlineError(f"{where}: the {what} has no turns: fill it or remove the row")
    roles, made = get_args(Role), []
    for turn in value:
        missing = {"role", "content"} - turn.keys()
        if missing:
            raise LeadlineError(f"{where}: a message has no {sorted(missing)[0]!r}: {mend}")
        if turn["role"] not in roles:
            raise LeadlineError(f"{where}: {unknown('role', str(turn['role']), roles)}")
        if turn.get("tool_calls"):
            raise LeadlineError(
                f"{where}: a message calls tools, which is not trained here: remove the row, or "
                "its 'tool_calls'"
            )
        content = _text(turn["content"], where, f"{turn['role']} turn", empty=True)
        made.append(Message(turn["role"], content))
    return tuple(made)


def _ordered(prompt: Prompt, where: str) -> Prompt:
    """A prompt whose turns follow each other: maybe a system turn, then user, assistant, user."""
    turns = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    said = [turn.role for turn in turns]
    right = ["user" if at % 2 == 0 else "assistant" for at in range(len(said))]
    if said != right or not said or said[-1] != "user":
        raise LeadlineError(
            f"{where}: roles out of order before the answer "
            f"({', '.join(turn.role for turn in prompt) or 'none'}): after at most one system "
            "turn, user and assistant take turns, from a user to a user"
        )
    for turn in turns:
        _text(turn.content, where, f"{turn.role} turn")
    return prompt
