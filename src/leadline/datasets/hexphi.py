"""HEx-PHI, https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI."""

from collections.abc import Iterator

from leadline.records import Prompt
from leadline.registry import dataset

from .tables import Row, fields, prompts, rows

# How to load the files on the hub: they have no header, and commas are part of the text. The
# second category was withdrawn.
_LOAD_OPTIONS = {
    "data_files": {f"category_{n}": f"category_{n}.csv" for n in (1, *range(3, 12))},
    "header": None,
    "names": ["instruction"],
    "sep": "\x01",
}


@dataset("hexphi", source="Qi et al. 2023, arXiv:2310.03693", licence="custom", rows=330)
def hexphi(*, path: str | None = None, hub: str = "LLM-Tuning-Safety/HEx-PHI") -> Iterator[Prompt]:
    """330 harmful instructions that policies prohibit, 30 in each of 11 categories.

    `path` is a folder with one file per category, whose lines are instructions, or a table with
    the columns instruction and category. Copies of 300 lack the second category.
    """
    names = ("instruction", "prompt")
    table = rows(path, hub, headerless=names, load=_LOAD_OPTIONS)
    table = fields(table, {"text": names}, {"category": ("category",)})
    return prompts("hexphi", map(_with_category, table), source=path or hub, published=(330, 300))


def _with_category(row: Row) -> Row:
    """Set the category (by default the file's name) and the id."""
    category = row.cells["category"] or row.part
    cells = {**row.cells, "category": category, "id": f"{category}/{row.number}"}
    return row._replace(cells=cells)
