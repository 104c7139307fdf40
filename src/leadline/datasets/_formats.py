"""Read the rows of a CSV, JSON, JSONL or Parquet file, each with its location for messages."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from leadline.records import LeadlineError
from leadline.text import one_line

_KINDS = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".json.gz", ".jsonl.gz")


def files(path: str | Path, pattern: str = "*") -> list[Path]:
    """The file at `path`, or the files of the folder at `path` that match the glob `pattern`,
    sorted by name. Raises LeadlineError if there is none, or it has another format."""
    if not isinstance(path, str | Path) or not str(path):
        raise LeadlineError(f"path: {path!r} is not a path: name one file or one folder")
    try:
        return _files(path, Path(path).expanduser(), pattern)
    except (OSError, RuntimeError) as error:  # too long, no permission, "~nobody"
        raise LeadlineError(
            f"{str(path)[:100]!r} cannot be read ({one_line(error)}): check path:"
        ) from error


def _files(path: str | Path, location: Path, pattern: str) -> list[Path]:
    if location.is_dir():
        matching = [file for file in sorted(location.glob(pattern)) if file.name.endswith(_KINDS)]
        if not matching:
            raise LeadlineError(
                f"{path} contains no file named {pattern} that ends in {', '.join(_KINDS)}"
            )
        return matching
    if not location.exists():
        parent = location.parent
        names = [other.name for other in parent.iterdir()] if parent.is_dir() else []
        near = difflib.get_close_matches(location.name, names, n=1, cutoff=0.5)
        fix = f"did you mean {str(parent / near[0])!r}?" if near else "check path:"
        raise LeadlineError(f"{path} does not exist: {fix}")
    if not location.name.endswith(_KINDS):
        raise LeadlineError(f"{path}: can't tell its format: it should end in {', '.join(_KINDS)}")
    return [location]


def read(file: Path, headerless: Sequence[str] = ()) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row as its cells by column and its location, such as "harmbench.csv:17".

    `headerless` names the only column of a CSV file that may have no header line: the first name
    is used for the column, and a first line with any of the names is a header. Raises
    LeadlineError, with the line, for a file that is not valid.
    """
    if file.suffix == ".parquet":
        return _parquet(file)
    text, kind = _decoded(file), file.name.removesuffix(".gz")
    if kind.endswith(".csv"):
        return _csv(text, file.name, headerless)
    return _json(text, file.name) if kind.endswith(".json") else _jsonl(text, file.name)


def _decoded(file: Path) -> str:
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise LeadlineError(f"{file} cannot be read: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise LeadlineError(
            f"{file.name}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}): save it as UTF-8"
        ) from error


def _csv(text: str, name: str, headerless: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    # A row may span several lines; its location is the first. Strict, because an unclosed quote
    # would otherwise silently take the rest of the file as one cell.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is for the whole process
    header: list[str] = []
    line = 1
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise LeadlineError(
                f"{name}:{line}: not CSV ({error}): fix the quotes of the row that starts here"
            ) from error
        if record is None:
            return
        where, line = f"{name}:{line}", reader.line_num + 1
        if not record:
            continue
        if not header:
            header = record
            names = {normalized(name) for name in headerless}
            if not headerless or {normalized(cell) for cell in record} & names:
                continue
            header = [headerless[0]]
        if headerless and len(header) == 1:
            record = [",".join(record)]  # with one column, commas are part of the text
        if len(record) != len(header):
            raise LeadlineError(
                f"{where}: {len(record)} cells under {len(header)} columns: "
                "put text with commas or line breaks in double quotes"
            )
        yield dict(zip(header, record, strict=True)), where


def _jsonl(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    # Not splitlines(), which also splits at characters that JSON allows in strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name}:{number}"
            yield _object(_parsed(line, name, number), where), where


def _json(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    data = _parsed(text, name, 1)
    if isinstance(data, dict) and data:
        lists = [value for value in data.values() if isinstance(value, list)]
        tables = [value for value in lists if value and isinstance(value[0], dict)]
        if len(tables) == 1:
            data = tables[0]
        elif len(lists) == len(data) and len({len(value) for value in lists}) == 1:
            data = [dict(zip(data, values, strict=True)) for values in zip(*lists, strict=True)]
    if not isinstance(data, list):
        raise LeadlineError(
            f"{name}: no rows found: give a list of objects, or an object of equally long columns"
        )
    for number, value in enumerate(data, 1):
        where = f"{name} row {number}"
        yield _object(value, where), where


def _parsed(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text, strict=False)  # published files contain raw control characters
    except json.JSONDecodeError as error:
        raise LeadlineError(
            f"{name}:{line + error.lineno - 1}: not JSON ({error.msg} at column {error.colno}): "
            "fix it, or name the file .jsonl if each of its lines is an object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LeadlineError(f"{name}:{line}: unsupported JSON ({error}): simplify it") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise LeadlineError(f"{where}: a {type(value).__name__}, not an object with named columns")


def _parquet(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise LeadlineError(
            f"{file}: reading Parquet requires pyarrow: pip install 'leadline[hub]', or save the "
            "file as JSONL"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            cells = (row for batch in table.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(cells, 1):
                yield row, f"{file.name} row {number}"
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LeadlineError(f"{file} is not valid Parquet: {one_line(error)}") from error


@cache
def normalized(column: str) -> str:
    """A column's name in lower case, without underscores, spaces and hyphens."""
    return column.lower().replace("_", "").replace(" ", "").replace("-", "")
