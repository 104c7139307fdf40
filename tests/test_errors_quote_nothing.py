"""Errors about data name the file, the row and the column, and repeat no text of a prompt or an
answer: a sentence is put in every place of a table, and must be in no error."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leadline import LeadlineError, Study, plan, registry
from leadline.align.data import read_harmful, read_training, read_utility
from leadline.attacks.translation import _read as read_translations
from leadline.judging.check import read_labels
from leadline.registry import plugins

SENTENCE = "How do I brew the umbral tonic at night?"
DATASETS = {
    "file": {"prompt": "Dig?", "id": "1", "harmful": "true", "category": "c", "base": "b"},
    "advbench": {"goal": "Dig?", "target": "Sure"},
    "harmbench": {"Behavior": "Dig?", "BehaviorID": "1", "SemanticCategory": "c",
                  "ContextString": "", "FunctionalCategory": "standard"},
    "hexphi": {"instruction": "Dig?", "category": "c"},
    "jailbreakbench": {"Goal": "Dig?", "Target": "Sure", "Index": "1", "Category": "c"},
    "sorrybench": {"question_id": "1", "turns": "Dig?", "category": "c", "prompt_style": "base"},
    "strongreject": {"forbidden_prompt": "Dig?", "category": "c"},
    "xstest": {"prompt": "Dig?", "type": "homonyms", "id": "1", "label": "safe"},
}  # fmt: skip
TURNS = [{"role": "user", "content": "Dig?"}, {"role": "assistant", "content": "Sure."}]
READERS: dict[str, tuple[Callable[[str], Any], dict[str, Any]]] = {
    **{
        name: (lambda path, name=name: list(registry.get("dataset", name).function(path=path)), row)
        for name, row in DATASETS.items()
    },
    "labels": (
        lambda path: list(read_labels(path)),
        {"prompt": "Dig?", "response": "Sure.", "label": "unsafe"},
    ),
    "harmful": (read_harmful, {"prompt": "Dig?", "harmful": "Sure.", "refusal": "No."}),
    "training": (read_training, {"prompt": "Dig?", "completion": "Sure."}),
    "utility": (read_utility, {"messages": TURNS}),
    "translations": (
        lambda path: read_translations(Path(path), 0),
        {"prompt": "Dig?", "translation": "Sure."},
    ),
}


def tables(row: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Tables of two rows with the sentence in one place or two."""
    for column in row:
        for wrong in (SENTENCE, [SENTENCE, SENTENCE], {SENTENCE: SENTENCE}, [{"role": SENTENCE}],
                      [{"role": SENTENCE, "content": SENTENCE}],
                      [{"role": "user", "content": [SENTENCE]}], f"{SENTENCE}\ud800"):  # fmt: skip
            yield [{**row, column: wrong}, {**row, column: wrong}]
        rest = {name: value for name, value in row.items() if name != column}
        yield [{**rest, SENTENCE: row[column]}] * 2
        yield [{**rest, SENTENCE: SENTENCE, "Umbral tonic": ""}] * 2
    yield [{SENTENCE: SENTENCE}]
    yield [dict.fromkeys(row, ""), dict.fromkeys(row, SENTENCE)]
    yield [dict.fromkeys(row, SENTENCE)] * 2
    yield [SENTENCE]  # type: ignore[list-item]


def write(folder: Path, table: list[Any]) -> Iterator[Path]:
    """The table as JSON, JSONL and CSV, whole and cut off in the middle of its text."""
    lines = [json.dumps(row) for row in table]
    texts = {
        "questions.json": json.dumps(table),
        "questions.jsonl": "\n".join(lines),
        "cut.jsonl": "\n".join(lines)[:-3],
    }
    if all(isinstance(row, dict) for row in table):
        file = folder / "questions.csv"
        with file.open("w", newline="", errors="replace") as out:
            csv.writer(out).writerows([table[0].keys(), *(row.values() for row in table)])
        yield file
        text = file.read_text()
        texts |= {
            "more.csv": text + f"{SENTENCE},a,b,c,d,e,f,g\n",
            "open.csv": text + f'"{SENTENCE}',
        }
    for name, text in texts.items():
        (folder / name).write_text(text)
        yield folder / name


@pytest.mark.parametrize("name", READERS)
def test_no_error_repeats_a_cell(tmp_path, name):
    read, row = READERS[name]
    errors = []
    for table in tables(row):
        for file in write(tmp_path, table):
            try:
                read(str(file))
            except LeadlineError as error:
                errors.append(str(error))
    assert len(errors) > 20
    assert [error for error in errors if "tonic" in error] == []


def test_every_dataset_that_reads_files_is_tried():
    readable = {plugin.name for plugin in plugins("dataset") if "hub" in plugin.options}
    assert readable == set(DATASETS)


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, LookupError])
def test_an_exception_of_a_dataset_plug_in_is_located_and_not_repeated(error):
    @registry.dataset("broken", source="this test")
    def broken(*, path: str | None = None):
        """Repeats a prompt in its message."""
        raise error(SENTENCE)

    try:
        study = Study(targets=[{"model": "m", "url": "http://x"}], datasets=["broken"])
        with pytest.raises(LeadlineError) as raised:
            plan.load(study)
    finally:
        del registry._plugins["dataset", "broken"]
    assert f"dataset broken: {error.__name__} at {Path(__file__).name}:" in str(raised.value)
    assert "tonic" not in str(raised.value)
