"""XSTest, https://github.com/paul-rottger/xstest."""

from collections.abc import Iterator

from leadline.records import Prompt
from leadline.registry import dataset

from .tables import Row, fields, prompts, rows


def _outline(**options: object) -> Iterator[Prompt]:
    return (Prompt(str(n), "", "xstest", harmful=n >= 250) for n in range(450))


@dataset(
    "xstest",
    source="Röttger et al. 2023, arXiv:2308.01263",
    licence="CC-BY-4.0",
    rows=450,
    outline=_outline,
)
def xstest(*, path: str | None = None, hub: str = "Paul/XSTest") -> Iterator[Prompt]:
    """250 harmless prompts that look harmful, for over-refusal, and 200 harmful contrasts."""
    required = {"text": ("prompt",), "category": ("type",)}
    table = fields(rows(path, hub), required, {"id": ("id",), "harmful": ("label",)})
    return prompts("xstest", map(_with_label, table), source=path or hub, published=(450,))


def _with_label(row: Row) -> Row:
    """Set `harmful`. The second release has no label column: there, the contrast types are the
    unsafe ones."""
    contrast = row.cells["category"].startswith("contrast")
    label = row.cells["harmful"] or ("unsafe" if contrast else "safe")
    return row._replace(cells={**row.cells, "harmful": label})
