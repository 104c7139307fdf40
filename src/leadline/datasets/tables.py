"""Datasets from tables: a file, a folder of files, or a Hugging Face hub id.

Three generators, chained: `rows` reads rows with their locations, `fields` selects and renames
columns, and `prompts` converts rows to prompts and checks ids and the number of rows.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from leadline.records import LeadlineError, Prompt
from leadline.registry import unknown
from leadline.text import one_line

from ._formats import files, normalized, read

_log = logging.getLogger("leadline")
_HARMFUL = {"true": True, "1": True, "unsafe": True, "harmful": True}
_HARMFUL |= {"false": False, "0": False, "safe": False, "harmless": False, "benign": False}


class Row(NamedTuple):
    """One row of a table. `where` is its location for messages ("harmbench.csv:17"), `part` the
    file's stem or the hub's "config/split", and `number` counts from 1 within the part."""

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
    """Yield the rows at `path` (a file, or the files in a folder that match `pattern`), or else
    those of the hub id `hub` in each of `configs`.

    `headerless` is for CSV files of one column that may have no header line: the first spelling
    names the column, and a first line that matches any spelling is a header. `load` has arguments
    for `datasets.load_dataset`. Raises LeadlineError if nothing can be read.
    """
    if path is not None:
        for file in files(path, pattern):
            number = 0
            for number, (cells, where) in enumerate(read(file, headerless), 1):
                yield Row(cells, where, file.name.partition(".")[0], number)
            if not number:
                raise LeadlineError(f"{file} holds no rows: check that it is the right file")
    elif hub:
        for config in configs:
            yield from _hub(hub, config, load or {})
    else:
        raise LeadlineError("nothing to read: set path: to a file or hub: to a dataset's id")


def fields(
    table: Iterator[Row],
    needs: Mapping[str, Sequence[str]],
    may: Mapping[str, Sequence[str]] | None = None,
    exist: Collection[str] = (),
) -> Iterator[Row]:
    """Yield the rows with columns selected and renamed, and every cell converted to text.

    `needs` and `may` map the new names to accepted column names; case, spaces, hyphens and
    underscores do not matter. A column in `needs` must exist and its cells must not be empty. A
    column in `may` can be missing, and is then "", unless `exist` contains its new name. Raises
    LeadlineError for a missing column, an empty cell or a cell that is not text.
    """
    may = may or {}
    for row in table:
        by_name = {normalized(column): column for column in row.cells}
        cells = dict.fromkeys(may, "")
        for field, spellings in {**needs, **may}.items():
            matches = (s if s in row.cells else by_name.get(normalized(s)) for s in spellings)
            column = next((match for match in matches if match is not None), None)
            if column is not None:
                cells[field] = _text(row.cells[column], row.where, column)
                if field in needs and not cells[field].strip():
                    raise LeadlineError(
                        f"{row.where}: the column {column!r} is empty: fill it or remove the row"
                    )
            elif field in needs or field in exist:
                raise LeadlineError(_missing(row, spellings))
        yield row._replace(cells=cells)


def prompts(
    dataset: str, table: Iterator[Row], *, source: str | None, published: Sequence[int] = ()
) -> Iterator[Prompt]:
    """Yield a Prompt for each row; its cells are named like Prompt's fields.

    Without an id, the row's number is the id. `source` is the path or hub id for messages. Logs a
    warning if the number of rows is not in `published`. Raises LeadlineError for a duplicate id, an
    unknown `harmful` label, or no rows.
    """
    seen: dict[str, str] = {}
    for number, (cells, where, _, _) in enumerate(table, 1):
        name = cells.pop("id", "") or str(number)
        if name in seen:
            raise LeadlineError(
                f"{where}: the id {name!r} is already taken at {seen[name]}: "
                "remove one of the two rows or give it another id"
            )
        seen[name] = where
        label = cells.pop("harmful", "").strip().lower() or "true"
        if label not in _HARMFUL:
            raise LeadlineError(
                f"{where}: {label!r} is not a label for harmful: write one of {', '.join(_HARMFUL)}"
            )
        yield Prompt(id=name, dataset=dataset, harmful=_HARMFUL[label], **cells)
    if not seen:
        raise LeadlineError(f"{source}: no rows of {dataset} match: check its options")
    if published and len(seen) not in published:
        sizes = " or ".join(map(str, published))
        _log.warning("%s has %d rows; the published dataset has %s", source, len(seen), sizes)


def names(option: str, value: Any, valid: Iterable[str] = ()) -> tuple[str, ...]:
    """The value of an option that takes one name or a list of names, without duplicates.

    Raises LeadlineError for another type, an empty list, or a name that is not in `valid`.
    """
    chosen = (value,) if isinstance(value, str) else value
    if not isinstance(chosen, list | tuple) or not chosen:
        raise LeadlineError(f"{option}: {value!r} is neither a name nor a list of names")
    for name in chosen:
        if valid and name not in valid:
            raise LeadlineError(unknown(f"entry of {option}:", str(name), valid))
    return tuple(dict.fromkeys(map(str, chosen)))


def _hub(name: str, config: str | None, load: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of all splits of a hub dataset."""
    try:
        import datasets
    except ImportError as error:
        raise LeadlineError(
            f"{name} is on the Hugging Face hub: pip install 'leadline[hub]' to fetch it, "
            "or set path: to a local copy"
        ) from error
    try:
        splits = datasets.load_dataset(name, config, **load)
    except Exception as error:  # from the network, the hub or the parser; none is retried
        if isinstance(error, ConnectionError):
            reason = "the hub can't be reached: connect, or set path: to a local copy"
        elif "gated" in str(error):
            reason = (
                f"access is gated: accept its terms at https://huggingface.co/datasets/{name} "
                "and set HF_TOKEN, or set path: to a local copy"
            )
        else:
            reason = f"{one_line(error).rstrip('.')}: check hub:, or set path: to a local copy"
        raise LeadlineError(f"{name}: {reason}") from error
    for split in splits:
        part = f"{config}/{split}" if config else str(split)
        for number, cells in enumerate(splits[split], 1):
            yield Row(cells, f"{name} {part} row {number}", part, number)


def _text(value: Any, where: str, column: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # SORRY-Bench has a list of one turn
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas converts integer columns with gaps to floats
    if not isinstance(value, str | int | float):
        raise LeadlineError(
            f"{where}: the column {column!r} has a {type(value).__name__} where text is expected"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LeadlineError(
            f"{where}: the column {column!r} has an unpaired surrogate: correct that text"
        ) from error
    return text


def _missing(row: Row, spellings: Sequence[str]) -> str:
    wanted, *others = spellings
    near = difflib.get_close_matches(wanted.lower(), [c.lower() for c in row.cells], n=1)
    column = next((c for c in row.cells if [c.lower()] == near), None)
    return (
        f"{row.where}: no column {wanted!r}"
        + (f" (nor {', '.join(map(repr, others))})" if others else "")
        + f"; it has {', '.join(repr(c[:30]) for c in list(row.cells)[:20]) or 'none'}: "
        + (f"did you mean {column[:30]!r}? " if column else "")
        + "rename the column, or read the file as the dataset 'file' with columns:"
    )
