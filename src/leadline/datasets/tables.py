"""Tables as upstream publishes them: a file, a folder of files, or a Hugging Face hub id.

Three steps, each a generator: `rows` reads and says where each row stands, `fields` picks the
columns that a dataset knows by any accepted spelling, `prompts` makes prompts and checks the whole.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from leadline.records import LeadlineError, Prompt
from leadline.registry import unknown
from leadline.text import one_line

from ._formats import files, plain, read

_log = logging.getLogger("leadline")
_HARMFUL = {"true": True, "1": True, "unsafe": True, "harmful": True}
_HARMFUL |= {"false": False, "0": False, "safe": False, "harmless": False, "benign": False}


class Row(NamedTuple):
    """`where` is for people ("harmbench.csv:17"). `part` is what upstream divides the table by (a
    file's stem, or the hub's "config/split"), `number` counts the part's rows from 1."""

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
    bare: Sequence[str] = (),
    load: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """The rows at `path` (a file, or a folder's files that match `pattern`), else of the hub's id.

    `bare` names the one column of CSV files that may lack a header line; its other spellings
    tell a header from a first row. `load` goes to `datasets.load_dataset`.
    """
    if path is not None:
        for file in files(path, pattern):
            number = 0
            for number, (cells, where) in enumerate(read(file, bare), 1):
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
    """The same rows with our names for columns and only text in the cells. Both mappings go from
    our name to accepted spellings; case, spaces and underscores don't matter. A column of `needs`
    must exist and be filled; one of `may` that is missing is "", unless it should `exist`."""
    may = may or {}
    for row in table:
        found = {plain(column): column for column in row.cells}
        cells = dict.fromkeys(may, "")
        for field, spellings in {**needs, **may}.items():
            matches = (s if s in row.cells else found.get(plain(s)) for s in spellings)
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
    dataset: str, table: Iterator[Row], *, of: str | None, published: Sequence[int] = ()
) -> Iterator[Prompt]:
    """A prompt from each row, whose cells are named like Prompt's fields. Without an id, the row's
    number is the id. `of` is what was read; a size other than the published ones is warned of."""
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
                f"{where}: {label!r} doesn't say whether the prompt is harmful: "
                f"write one of {', '.join(_HARMFUL)}"
            )
        yield Prompt(id=name, dataset=dataset, harmful=_HARMFUL[label], **cells)
    if not seen:
        raise LeadlineError(f"{of}: no row is left for {dataset}: check its options")
    if published and len(seen) not in published:
        sizes = " or ".join(map(str, published))
        _log.warning("%s holds %d rows; the published set has %s", of, len(seen), sizes)


def several(option: str, value: Any, valid: Iterable[str] = ()) -> tuple[str, ...]:
    """An option that takes one name or a list of them, checked against the valid ones if any."""
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
            f"{name} is on the Hugging Face hub: pip install 'leadline[hub]' to fetch it, "
            "or set path: to a local copy"
        ) from error
    try:
        splits = datasets.load_dataset(name, config, **load)
    except Exception as error:  # many kinds, from the network to the files; all of them are final
        if isinstance(error, ConnectionError):
            why = "the hub can't be reached: connect, or set path: to a local copy"
        elif "gated" in str(error):
            why = (
                f"access is gated: accept its terms at https://huggingface.co/datasets/{name} "
                "and set HF_TOKEN, or set path: to a local copy"
            )
        else:
            why = f"{one_line(error).rstrip('.')}: check hub:, or set path: to a local copy"
        raise LeadlineError(f"{name}: {why}") from error
    for split in splits:
        part = f"{config}/{split}" if config else str(split)
        for number, cells in enumerate(splits[split], 1):
            yield Row(cells, f"{name} {part} row {number}", part, number)


def _text(value: Any, where: str, column: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # SORRY-Bench's turns
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns a column of ids with a gap into floats
    if not isinstance(value, str | int | float):
        raise LeadlineError(
            f"{where}: the column {column!r} holds a {type(value).__name__} where text belongs"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LeadlineError(
            f"{where}: the column {column!r} holds half of a surrogate pair: mend that text"
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
