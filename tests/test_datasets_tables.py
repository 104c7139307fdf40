"""Reading tables: formats, locations of rows, columns, and the messages for invalid files."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.datasets.advbench import advbench
from leadline.datasets.file import file
from leadline.datasets.tables import fields, rows
from leadline.records import LeadlineError, Prompt

GARDEN = [
    {"id": "rose", "prompt": "How do I prune a rose?", "category": "shrubs"},
    {"id": "leek", "prompt": "When are leeks, onions and garlic sown?", "category": "beds"},
]


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def wrong(read: Callable[[], Any]) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises(LeadlineError) as caught:
        list(read())
    message = str(caught.value)
    assert "\n" not in message
    return message


def as_csv(path: Path, table: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def as_json(path: Path, table: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(table, indent=1), "utf-8")


def as_columns(path: Path, table: list[dict[str, str]]) -> None:
    path.write_text(json.dumps({key: [row[key] for row in table] for key in table[0]}), "utf-8")


def as_nested(path: Path, table: list[dict[str, str]]) -> None:
    path.write_text(json.dumps({"version": 2, "data": table}), "utf-8")


def as_jsonl(path: Path, table: list[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
    path.write_bytes("".join(lines).encode())


def as_parquet(path: Path, table: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)


def as_gzip(path: Path, table: list[dict[str, str]]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, table)).encode()))


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("garden.csv", as_csv),
        ("garden.json", as_json),
        ("garden.json", as_columns),
        ("garden.json", as_nested),
        ("garden.jsonl", as_jsonl),
        ("garden.jsonl.gz", as_gzip),
        ("garden.parquet", as_parquet),
    ],
)
def test_every_format_gives_the_same_prompts(
    tmp_path: Path, name: str, save: Callable[[Path, list[dict[str, str]]], None]
) -> None:
    save(tmp_path / name, GARDEN)
    expected = [Prompt(r["id"], r["prompt"], "garden", r["category"]) for r in GARDEN]
    assert list(file(path=str(tmp_path / name))) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(
            str.strip
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_is_read_unchanged_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    table = [{"prompt": text, "context": text[::-1]} for text in texts]
    for name, save in [("a.csv", as_csv), ("a.jsonl", as_jsonl), ("a.parquet", as_parquet)]:
        save(folder / name, table)
        read = [(p.text, p.context) for p in file(path=str(folder / name))]
        assert read == [(row["prompt"], row["context"]) for row in table], name


def test_a_row_is_located_by_its_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "g.csv", 'prompt,context\r\n\r\nDig,"one\r\ntwo"\r\nSow,three\r\n')
    found = [(row.cells["context"], row.where) for row in rows(path, None)]
    assert found == [("one\r\ntwo", "g.csv:3"), ("three", "g.csv:5")]


def test_byte_order_marks_and_raw_control_characters_are_supported(tmp_path: Path) -> None:
    path = write(tmp_path / "bom.csv", "\ufeffprompt\nRake\n")
    assert [p.text for p in file(path=path)] == ["Rake"]
    path = write(tmp_path / "old-mac.csv", "prompt\rRake\rSow\r")
    assert [p.text for p in file(path=path)] == ["Rake", "Sow"]
    path = write(tmp_path / "raw.jsonl", '{"prompt": "Rake\x0b\tthe\x1fleaves\u2028now"}\n')
    assert [p.text for p in file(path=path)] == ["Rake\x0b\tthe\x1fleaves\u2028now"]


def test_columns_match_whatever_their_case_and_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "g.csv", "Behavior_ID,FORBIDDEN PROMPT\nx,Weed\n")
    table = fields(rows(path, None), {"id": ("BehaviorID",), "text": ("forbidden_prompt",)})
    assert next(table).cells == {"id": "x", "text": "Weed"}


def test_the_exact_spelling_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "g.csv", "Ask,ask\nDig,Sow\n")
    assert [p.text for p in file(path=path, columns={"text": "Ask"})] == ["Dig"]


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", '{"id": 7.0, "prompt": "Dig"}\n{"id": 8, "prompt": "Sow"}')
    assert [p.id for p in file(path=path)] == ["7", "8"]


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", "prompt\nWeed\n")
    write(tmp_path / "a.jsonl", '{"prompt": "Rake"}\n')
    write(tmp_path / "README.md", "about")
    found = [(r.cells["prompt"], r.where, r.part, r.number) for r in rows(str(tmp_path), None)]
    assert found == [("Rake", "a.jsonl:1", "a", 1), ("Weed", "b.csv:2", "b", 1)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.csv", "prompt\nRake\n  \n", "g.csv:3: the column 'prompt' is empty: fill it"),
        ("g.csv", "id,prompt\na,Dig\na,Sow\n", "g.csv:3: the id ('a') is already taken at g.csv:2"),
        ("g.csv", "prompt,x\nDig, deep,1\n", "g.csv:2: 3 cells under 2 columns"),
        ("g.csv", 'prompt\nDig\n"Sow\nRake\n', "g.csv:3: not CSV (unexpected end of data)"),
        ("g.csv", "prompt\n", "g.csv contains no rows"),
        ("g.csv", "promt\nDig\n", "g.csv:2: no column 'prompt' (nor 'text', "),
        ("g.csv", "promt\nDig\n", "it has 'promt': did you mean 'promt'? rename the column"),
        ("g.json", '[\n{"prompt": "Dig"},\n{"prompt": }]', "g.json:3: not JSON (Expecting value"),
        ("g.json", '{"prompt": "Dig"}', "g.json: no rows found"),
        ("g.json", '{"a": [1, 2], "b": [1]}', "g.json: no rows found"),
        ("g.json", '[{"prompt": "Dig"}, "Sow"]', "g.json row 2: a str, not an object"),
        ("g.jsonl", '{"prompt": "Dig"}\n{"prompt": "S', "g.jsonl:2: not JSON (Unterminated"),
        ("g.jsonl", '{"prompt": "Dig"}\n\n[1]\n', "g.jsonl:3: a list, not an object"),
        ("g.jsonl", '{"prompt": ["a", "b"]}', "g.jsonl:1: the column 'prompt' contains a list"),
        ("g.jsonl", '{"prompt": "\\ud800"}', "g.jsonl:1: the column 'prompt' contains half of a"),
        ("g.jsonl", "[" * 100_000, "g.jsonl:1: unsupported JSON"),
        ("g.parquet", "PAR1 not really", "g.parquet is not valid Parquet"),
        ("g.csv.gz", "prompt\nDig\n", "g.csv.gz cannot be read: Not a gzipped file"),
        ("g.xlsx", "prompt", "g.xlsx: can't tell its format: it should end in .csv, .json"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line_with_its_location(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = write(tmp_path / name, text)
    assert message in wrong(lambda: file(path=path))


def test_text_that_is_not_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "g.csv", "prompt\nDig\nPrune the rosé\n", "latin-1")
    assert wrong(lambda: file(path=path)) == "g.csv:3: not UTF-8 (byte 0xe9): save it as UTF-8"


def test_a_path_that_does_not_exist_is_reported_with_a_similar_one(tmp_path: Path) -> None:
    write(tmp_path / "garden.csv", "prompt\nDig\n")
    message = wrong(lambda: file(path=str(tmp_path / "gardn.csv")))
    assert message.endswith(f"does not exist: did you mean '{tmp_path / 'garden.csv'}'?")
    assert "check path:" in wrong(lambda: file(path=str(tmp_path / "no" / "such.csv")))


def test_paths_with_nothing_to_read(tmp_path: Path) -> None:
    assert "contains no file named * that ends in .csv" in wrong(lambda: file(path=str(tmp_path)))
    assert "is not a path" in wrong(lambda: file(path=["a.csv"]))
    assert "set path: to a file or hub:" in wrong(file)


def test_a_size_other_than_the_published_one_is_logged_as_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = "".join(f"Plant tree {n},Sure: dig\n" for n in range(520))
    whole = write(tmp_path / "whole.csv", "goal,target\n" + lines)
    part = write(tmp_path / "part.csv", "goal,target\nDig,Sure\n")
    with caplog.at_level(logging.WARNING, "leadline"):
        assert len(list(advbench(path=whole))) == 520
        assert not caplog.messages
        list(advbench(path=part))
    assert caplog.messages == [f"{part} has 1 rows; the published dataset has 520"]


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.csv",
        "nr,ask,topic,kind,begin\n7,Dig?,beds,unsafe,Sure\n8,Sow?,,harmless,\n9,Rake?,beds,1,\n",
    )
    columns = {"text": "ask", "id": "nr", "category": "topic", "harmful": "kind", "target": "begin"}
    assert list(file(path=path, columns=columns, name="yard")) == [
        Prompt("7", "Dig?", "yard", "beds", target="Sure"),
        Prompt("8", "Sow?", "yard", "", harmful=False),
        Prompt("9", "Rake?", "yard", "beds"),
    ]


def test_mapped_columns_must_exist_and_be_valid(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", "prompt,topic\nDig?,maybe\n")
    assert "no column 'subject'; it has 'prompt', 'topic'" in wrong(
        lambda: file(path=path, columns={"category": "subject"})
    )
    assert "mine.csv:2: invalid value ('maybe') in the column for 'harmful': write one of" in wrong(
        lambda: file(path=path, columns={"harmful": "topic"})
    )
    assert "unknown entry of columns: 'txt': did you mean 'text'" in wrong(
        lambda: file(path=path, columns={"txt": "prompt"})
    )
    assert "columns: 'prompt' is not a mapping" in wrong(lambda: file(path=path, columns="prompt"))
