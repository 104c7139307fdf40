"""Prompts of your own."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from leadline.records import LeadlineError, Prompt
from leadline.registry import dataset, unknown

from .tables import fields, prompts, rows

_SPELLINGS: dict[str, tuple[str, ...]] = {
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
    """Prompts of your own, from CSV, JSON, JSONL, Parquet or the hub.

    `columns` maps our names (text, id, category, harmful, context, target, base, mutation) to the
    table's; those left out are looked for under their usual names. `name` is what the results
    call the dataset: the file's name unless set.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise LeadlineError(f"columns: {columns!r} is no mapping: write columns: {{text: ...}}")
    mapped = {ours: (str(theirs),) for ours, theirs in (columns or {}).items()}
    for ours in mapped:
        if ours not in _SPELLINGS:
            raise LeadlineError(unknown("entry of columns:", str(ours), _SPELLINGS))
    may = _SPELLINGS | mapped
    needs = {"text": may.pop("text")}
    table = fields(rows(path, hub), needs, may, exist=mapped)
    source = path or hub
    return prompts(name or Path(str(source or "file")).name.partition(".")[0], table, of=source)
