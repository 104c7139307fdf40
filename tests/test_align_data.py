"""Training data: every format, and errors that name the file, the row and a fix."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leadline.align.data import (
    Dialogue,
    Triplet,
    check_lengths,
    dialogue,
    read_harmful,
    read_training,
    read_utility,
)
from leadline.models.template import Template
from leadline.records import LeadlineError, Message

from . import tiny_models

USER, ASSISTANT = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
SYSTEM = {"role": "system", "content": "Be kind."}
GOOD = {"prompt": "Q?", "completion": "A."}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_triplets_of_every_shape(tmp_path: Path):
    rows = [
        {"prompt": "Q?", "harmful": "Sure.", "refusal": "No."},
        {"prompt": [SYSTEM, USER], "harmful": "Sure.", "refusal": None},
        {"prompt": [USER, ASSISTANT, USER], "harmful": "Sure."},
    ]
    read = read_harmful(write(tmp_path / "h.jsonl", rows))
    user, system, assistant = (
        Message(m["role"], m["content"])
        for m in (USER, SYSTEM, ASSISTANT)  # type: ignore[arg-type]
    )
    assert read == [
        Triplet((user,), "Sure.", "No.", "h.jsonl:1"),
        Triplet((system, user), "Sure.", "", "h.jsonl:2"),
        Triplet((user, assistant, user), "Sure.", "", "h.jsonl:3"),
    ]
    assert read[1].row() == {"prompt": [SYSTEM, USER], "harmful": "Sure.", "refusal": ""}


def test_dialogues_of_every_shape_are_the_same_dialogue(tmp_path: Path):
    rows = [
        GOOD,
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "prompt": None, "completion": None},
    ]
    for read in (read_training, read_utility):
        made = read(write(tmp_path / "d.jsonl", rows))
        assert {(d.prompt, d.answer) for d in made} == {((Message("user", "Q?"),), "A.")}
    assert made[0].row() == rows[1]


def test_the_last_answer_is_the_one_to_learn(tmp_path: Path):
    longer = {"messages": [SYSTEM, USER, ASSISTANT, USER, {"role": "assistant", "content": "B."}]}
    (made,) = read_training(write(tmp_path / "d.jsonl", [longer]))
    assert [m.role for m in made.prompt] == ["system", "user", "assistant", "user"]
    assert made.answer == "B."


def test_answers_that_are_to_be_generated_may_be_missing(tmp_path: Path):
    rows = [{"prompt": "Q?"}, {"prompt": "Q?", "completion": " "}, {"messages": [USER]}]
    assert [d.answer for d in read_utility(write(tmp_path / "u.jsonl", rows))] == ["", "", ""]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_other_formats(tmp_path: Path, kind: str):
    rows = [{"prompt": "Q?", "harmful": "Sure,\nhere", "refusal": r} for r in ("No.", "Never.")]
    path = tmp_path / f"h.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = read_harmful(path)
    assert [(t.harmful, t.refusal) for t in read] == [
        ("Sure,\nhere", "No."),
        ("Sure,\nhere", "Never."),
    ]
    assert (
        read[1].where
        == {"csv": "h.csv:4", "json": "h.json row 2", "parquet": "h.parquet row 2"}[kind]
    )


HARMFUL: list[tuple[Any, str]] = [
    ({"prompt": "Q?"}, "no column 'harmful', among 'prompt': add it, or rename one to it"),
    ({"prompt": "Q?", "harmfull": "x"}, "no column 'harmful': unknown column 'harmfull': did you"),
    ({"Prompt": "Q?", "harmful": "x"}, "unknown column 'Prompt': did you mean 'prompt'?"),
    ({"prompt": "Q?", "harmful": " "}, "column 'harmful' is empty: fill it or remove the row"),
    ({"prompt": "", "harmful": "x"}, "column 'prompt' is empty: fill it or remove the row"),
    ({"prompt": "Q?", "harmful": 7}, "column 'harmful' has type int: write it as text"),
    ({"prompt": [], "harmful": "x"}, "column 'prompt' has no turns"),
    ({"prompt": [ASSISTANT], "harmful": "x"}, "roles out of order before the answer (assistant)"),
    ({"prompt": [SYSTEM], "harmful": "x"}, "roles out of order before the answer (system)"),
    ({"prompt": ["Q?"], "harmful": "x"}, "is not a list of messages: write [{"),
    ({"prompt": "Q\ud800?", "harmful": "x"}, "contains an unpaired surrogate: fix its encoding"),
    ([1], "a list, not an object with named columns"),
]
TRAINING: list[tuple[Any, str]] = [
    ({"prompt": "Q?"}, "no column 'completion'"),
    ({"prompt": "Q?", "completions": "A."}, "unknown column 'completions': did you mean"),
    (
        {"prompt": "Q?", "completion": "\n"},
        "column 'completion' is empty: fill it or remove the row",
    ),
    ({"text": "Q? A."}, "in a column 'text' the start of the answer is not known: use 'messages'"),
    ({"messages": [USER]}, "no assistant turn, so nothing to learn: add the answer or remove"),
    (
        {"messages": [USER, ASSISTANT, USER]},
        "the last turn is the user's: end with the assistant's",
    ),
    ({"messages": [USER, ASSISTANT | {"content": ""}]}, "the answer is empty"),
    (
        {"messages": [USER, ASSISTANT, ASSISTANT]},
        "roles out of order before the answer (user, assistant)",
    ),
    (
        {"messages": [USER, SYSTEM, ASSISTANT]},
        "roles out of order before the answer (user, system)",
    ),
    ({"messages": [ASSISTANT]}, "roles out of order before the answer (none)"),
    ({"messages": [USER | {"content": " "}, ASSISTANT]}, "the user turn is empty"),
    ({"messages": [{"role": "assistent", "content": "A."}]}, "unknown role ('assistent'): valid"),
    ({"messages": [{"content": "A."}]}, "a message has no 'role': write [{"),
    ({"messages": "[]"}, "column 'messages' is not a list of messages"),
    ({"messages": []}, "column 'messages' has no turns"),
    ({"prompt": "Q?", "completion": [USER]}, "a completion is one assistant turn, not 1 (user)"),
    ({"prompt": [USER], "completion": [ASSISTANT, USER]}, "not 2 (assistant, user)"),
]


@pytest.mark.parametrize(
    ("read", "good", "bad", "message"),
    [(read_harmful, {"prompt": "Q?", "harmful": "x"}, *fault) for fault in HARMFUL]
    + [(read_training, GOOD, *fault) for fault in TRAINING],
)
def test_errors_name_the_file_and_the_row(
    tmp_path: Path, read: Callable[[Path], Any], good: Any, bad: Any, message: str
):
    file = write(tmp_path / "data.jsonl", [good, good, bad])
    with pytest.raises(LeadlineError) as error:
        read(file)
    text = str(error.value)
    assert text.startswith("data.jsonl:3: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl contains no rows"),
        ("broken.jsonl", json.dumps(GOOD) + "\n{oops\n", "broken.jsonl:2: not JSON"),
        ("a.txt", "x", "can't tell its format"),
        ("b.csv", "prompt,completion\nQ?\n", "b.csv:2: 1 cells under 2 columns"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(LeadlineError, match=r"^[^\n]+$") as error:
        read_training(tmp_path / name)
    assert message in str(error.value)


def test_a_missing_file_is_named_with_a_similar_one(tmp_path: Path):
    write(tmp_path / "harmful.jsonl", [])
    with pytest.raises(
        LeadlineError, match=r"harmfull.jsonl does not exist: did you mean .*harmful"
    ):
        read_harmful(tmp_path / "harmfull.jsonl")


def test_a_row_that_is_too_long_is_named(tmp_path: Path):
    template = Template.of(tiny_models.tokenizer(), "tiny")
    file = write(tmp_path / "d.jsonl", [GOOD, GOOD | {"completion": "A." * 20}])
    rows = read_training(file)
    before, end = len("<user\nQ?>\n<assistant\n"), len(">\n")  # a mark is one token, as is a byte
    check_lengths(rows, template, before + 40 + end)
    check_lengths(rows, template, None)
    message = f"d.jsonl:2: its prompt and answer have {before + 40 + end} tokens, and max_length is"
    with pytest.raises(LeadlineError, match=message):
        check_lengths(rows, template, before + 40 + end - 1)
    short = Triplet((Message("user", "Q?"),), "Sure, " * 50, "No.", "h.jsonl:1")
    check_lengths(
        [short], template, before + 3 + end
    )  # a harmful answer may be truncated, to nothing
    with pytest.raises(LeadlineError, match=r"h.jsonl:1: its prompt and refusal have"):
        check_lengths([short], template, before + 3 + end - 1)


def test_a_row_that_the_chat_template_rejects_is_named():
    template = Template.of(
        tiny_models.tokenizer(
            "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
            "{{ raise_exception('one turn only') }}{% endif %}[{{ m.content }}]{% endfor %}"
        ),
        "picky",
    )
    turns = (Message("user", "Q?"), Message("assistant", "A."), Message("user", "R?"))
    with pytest.raises(
        LeadlineError, match=r"^d.jsonl:7: .*one turn only.*: fix or remove the row$"
    ):
        check_lengths([Dialogue(turns, "B.", "d.jsonl:7")], template, 100)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"content": None}, "the assistant turn is null"),
        ({"content": "a", "tool_calls": [{"type": "function"}]}, "tool calls"),
    ],
)
def test_null_content_and_tool_calls_are_errors(answer: dict[str, Any], message: str):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", **answer}]
    with pytest.raises(LeadlineError, match=message):
        dialogue({"messages": turns}, "d.jsonl:1")
