"""Read a dataset as it is published: one file, a folder of files, or a Hugging Face hub id.

Three steps, each a generator: `rows` reads the rows with their locations, `fields` selects and
renames the columns, `prompts` makes prompts from the rows and checks ids and size.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from leadline.records import LeadlineError, Prompt
from leadline.registry import unknown
from leadline.text import is_name, one_line, outline

from ._formats import files, normalized, read

_log = logging.getLogger("leadline")
_HARMFUL = {"true": True, "1": True, "unsafe": True, "harmful": True}
_HUB_ERRORS = ("builtins", "datasets", "huggingface_hub", "httpx", "requests")
_HARMFUL |= {"false": False, "0": False, "safe": False, "harmless": False, "benign": False}


class Row(NamedTuple):
    """A row of a table. `where` is its location for messages ("harmbench.csv:17"). `part` is the
    part of the dataset that it belongs to (a file's stem, or "config/split" on the hub), and
    `number` its number in that part, from 1."""

    cells: dict[str, Any]
    where: str
    part: str
    number: int


def rows(
    path: str | None,
    hub: str | None,
    *,
    configs: Sequence[str | None] = (None,),
    pattern: str = "*",
    headerless: Sequence[str] = (),
    load: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """The rows at `path` (a file, or the files of a folder that match `pattern`); without a path,
    the rows of the hub id `hub`, in each of `configs`.

    For `headerless` see `_formats.read`; `load` are arguments for `datasets.load_dataset`. Raises
    LeadlineError if there is nothing to read, or it cannot be read.
    """
    if path is not None:
        for file in files(path, pattern):
            number = 0
            for number, (cells, where) in enumerate(read(file, headerless), 1):
                yield Row(cells, where, file.name.partition(".")[0], number)
            if not number:
                raise LeadlineError(f"{file} contains no rows: check that it is the right file")
    elif hub:
        for config in configs:
            yield from _hub(hub, config, load or {})
    else:
        raise LeadlineError("nothing to read: set path: to a file or hub: to a dataset's id")


def fields(
    table: Iterator[Row],
    required: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] | None = None,
    exist: Collection[str] = (),
) -> Iterator[Row]:
    """The same rows with only the given fields, all of them text.

    `required` and `optional` map a field to the accepted names of its column; upper and lower
    case, spaces, hyphens and underscores make no difference. A required column must exist and not
    be empty. A missing optional column becomes "", unless it is in `exist`: then, as for a required
    one, LeadlineError is raised.
    """
    optional = optional or {}
    for row in table:
        columns = {normalized(column): column for column in row.cells}
        cells = dict.fromkeys(optional, "")
        for field, spellings in {**required, **optional}.items():
            matches = (s if s in row.cells else columns.get(normalized(s)) for s in spellings)
            column = next((match for match in matches if match is not None), None)
            if column is not None:
                cells[field] = _text(row.cells[column], row.where, column)
                if field in required and not cells[field].strip():
                    raise LeadlineError(
                        f"{row.where}: the column {column!r} is empty: fill it or remove the row"
                    )
            elif field in required or field in exist:
                raise LeadlineError(_missing(row, spellings))
        yield row._replace(cells=cells)


def prompts(
    dataset: str, table: Iterator[Row], *, source: str | None, published: Sequence[int] = ()
) -> Iterator[Prompt]:
    """A prompt from each row, whose cells are named like the fields of Prompt. A row without an id
    gets its number as id.

    `source` is the path or hub id, for messages. A number of rows that is not one of `published`
    is logged as a warning. Raises LeadlineError for an id that occurs twice, an invalid value of
    `harmful`, and a table without rows.
    """
    seen: dict[str, str] = {}
    for number, (cells, where, _, _) in enumerate(table, 1):
        name = cells.pop("id", "") or str(number)
        if name in seen:
            raise LeadlineError(
                f"{where}: the id ({outline(name)}) is already taken at {seen[name]}: "
                "remove one of the two rows or give it another id"
            )
        seen[name] = where
        label = cells.pop("harmful", "").strip().lower() or "true"
        if label not in _HARMFUL:
            raise LeadlineError(
                f"{where}: invalid value ({outline(label)}) in the column for 'harmful': "
                f"write one of {', '.join(_HARMFUL)}"
            )
        yield Prompt(id=name, dataset=dataset, harmful=_HARMFUL[label], **cells)
    if not seen:
        raise LeadlineError(f"{source}: no rows match the options of {dataset}: check its options")
    if published and len(seen) not in published:
        sizes = " or ".join(map(str, published))
        _log.warning("%s has %d rows; the published dataset has %s", source, len(seen), sizes)


def name_list(option: str, value: Any, valid: Iterable[str] = ()) -> tuple[str, ...]:
    """The value of an option that takes one name or a list of names, without duplicates. Raises
    LeadlineError for another type, or a name that is not one of `valid` (if there are any)."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise LeadlineError(f"{option}: {value!r} is neither a name nor a list of names")
    for name in names:
        if valid and name not in valid:
            raise LeadlineError(unknown(f"entry of {option}:", str(name), valid))
    return tuple(dict.fromkeys(map(str, names)))


def _hub(name: str, config: str | None, load: Mapping[str, Any]) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise LeadlineError(
            f"{name}: reading a dataset from the Hugging Face hub requires the datasets package: "
            "pip install 'leadline[hub]', or set path: to a local copy"
        ) from error
    try:
        splits = datasets.load_dataset(name, config, **load)
    except Exception as error:  # of many types, from the network to the parser; none is retried
        if isinstance(error, ConnectionError):
            reason = (
                "the hub cannot be reached: check the network connection, or set path: to a "
                "local copy"
            )
        elif "gated" in str(error):
            reason = (
                "the dataset is gated: accept its terms at "
                f"https://huggingface.co/datasets/{name} and set HF_TOKEN, or set path: to a "
                "local copy"
            )
        else:
            # Those of parsers, such as pyarrow's, may quote a cell.
            known = type(error).__module__.partition(".")[0] in _HUB_ERRORS
            message = one_line(error).rstrip(".") if known else type(error).__name__
            reason = f"{message}: check hub:, or set path: to a local copy"
        raise LeadlineError(f"{name}: {reason}") from error
    for split in splits:
        part = f"{config}/{split}" if config else str(split)
        for number, cells in enumerate(splits[split], 1):
            yield Row(cells, f"{name} {part} row {number}", part, number)


def _text(value: Any, where: str, column: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # the column `turns` of SORRY-Bench
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes integer ids as floats if one is missing
    if not isinstance(value, str | int | float):
        raise LeadlineError(
            f"{where}: the column {column!r} contains a {type(value).__name__}: it must be text"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LeadlineError(
            f"{where}: the column {column!r} contains half of a surrogate pair: fix the text"
        ) from error
    return text


def _missing(row: Row, spellings: Sequence[str]) -> str:
    """The message for a missing column. In a file without a header line the "columns" are the text
    of its first row, so that only single words are shown."""
    wanted, *others = spellings
    names = [column for column in row.cells if is_name(column)]
    message = f"{row.where}: no column {wanted!r}"
    message += f" (nor {', '.join(map(repr, others))})" if others else ""
    if row.cells and not names:
        return (
            f"{message}; the names of its {len(row.cells)} columns are not shown, since they may "
            f"be text: if the file has no header line, add one with {wanted!r}; otherwise rename "
            "the column"
        )
    near = difflib.get_close_matches(wanted.lower(), [c.lower() for c in names], n=1)
    column = next((c for c in names if [c.lower()] == near), None)
    hidden = len(row.cells) - len(names)
    return (
        f"{message}; it has {', '.join(map(repr, names[:20])) or 'none'}"
        + (f" and {hidden} with longer names: " if hidden else ": ")
        + (f"did you mean {column!r}? " if column else "")
        + "rename the column, or read the file as the dataset 'file' with columns:"
    )
