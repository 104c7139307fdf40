"""JailbreakBench's behaviors, https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors."""

from collections.abc import Iterator

from leadline.records import Prompt
from leadline.registry import dataset

from .tables import Row, fields, prompts, rows


def _outline(**options: object) -> Iterator[Prompt]:
    return (Prompt(str(n), "", "jailbreakbench", harmful=n < 100) for n in range(200))


@dataset(
    "jailbreakbench",
    source="Chao et al. 2024, arXiv:2404.01318",
    licence="MIT",
    rows=200,
    outline=_outline,
)
def jailbreakbench(
    *, path: str | None = None, hub: str = "JailbreakBench/JBB-Behaviors"
) -> Iterator[Prompt]:
    """100 harmful behaviors and 100 benign ones on the same topics.

    `path` is a folder with harmful-behaviors.csv and benign-behaviors.csv, or one of the two. In
    copies without the column Index, the number of the row (from 1) takes its place in the id.
    """
    table = fields(
        rows(path, hub, configs=("behaviors",), pattern="*behaviors*"),
        {"text": ("Goal",)},
        {"index": ("Index",), "target": ("Target",), "category": ("Category",)},
    )
    table = map(_with_half, table)
    return prompts("jailbreakbench", table, source=path or hub, published=(200, 100))


def _with_half(row: Row) -> Row:
    """Set `harmful` and the id. Only the name of the file or split says to which half a row
    belongs, and the indices of both halves start at 0."""
    cells = dict(row.cells)
    half = "benign" if "benign" in row.part.lower() else "harmful"
    cells |= {"id": f"{half}/{cells.pop('index') or row.number}", "harmful": half}
    return row._replace(cells=cells)
