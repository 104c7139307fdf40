"""Your own prompts, from a file or the hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from leadline.records import LeadlineError, Prompt
from leadline.registry import dataset, unknown

from .tables import fields, prompts, rows

_COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("prompt", "text", "goal", "instruction", "behavior", "question", "forbidden_prompt"),
    "id": ("id",),
    "category": ("category",),
    "harmful": ("harmful",),
    "context": ("context",),
    "target": ("target",),
    "base": ("base",),
    "mutation": ("mutation",),
}


@dataset("file", source="yours")
def file(
    *,
    path: str | None = None,
    hub: str | None = None,
    columns: Mapping[str, str] | None = None,
    name: str = "",
) -> Iterator[Prompt]:
    """Your own prompts, from CSV, JSON, JSONL, Parquet or the hub.

    `columns` maps fields (text, id, category, harmful, context, target, base, mutation) to names of
    the table's columns; the other fields are read from columns with their usual names. `name` is
    the name of the dataset in results, by default the file's name.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise LeadlineError(f"columns: {columns!r} is not a mapping: write columns: {{text: ...}}")
    mapped = {field: (str(column),) for field, column in (columns or {}).items()}
    for field in mapped:
        if field not in _COLUMN_NAMES:
            raise LeadlineError(unknown("entry of columns:", str(field), _COLUMN_NAMES))
    optional = _COLUMN_NAMES | mapped
    required = {"text": optional.pop("text")}
    table = fields(rows(path, hub), required, optional, exist=mapped)
    source = path or hub
    return prompts(name or Path(str(source or "file")).name.partition(".")[0], table, source=source)
