"""HarmBench's text behaviors, https://github.com/centerforaisafety/HarmBench."""

from collections.abc import Iterator, Sequence

from leadline.records import LeadlineError, Prompt
from leadline.registry import dataset
from leadline.text import outline

from .tables import Row, fields, name_list, prompts, rows

_SIZES = {"standard": 200, "contextual": 100, "copyright": 100}
_DEFAULT = ("standard", "contextual")


def _outline(*, functional: str | Sequence[str] = _DEFAULT, **_: object) -> Iterator[Prompt]:
    for name in name_list("functional", functional, _SIZES):
        yield from (Prompt(f"{name}/{n}", "", "harmbench") for n in range(_SIZES[name]))


@dataset(
    "harmbench",
    source="Mazeika et al. 2024, arXiv:2402.04249",
    licence="MIT",
    rows=300,
    outline=_outline,
)
def harmbench(
    *,
    path: str | None = None,
    hub: str = "walledai/HarmBench",
    functional: str | Sequence[str] = _DEFAULT,
) -> Iterator[Prompt]:
    """300 harmful behaviors: 200 standard ones, and 100 contextual ones (with a context).

    `functional` selects one or several of standard, contextual and copyright. The 100 copyright
    behaviors are left out by default: upstream scores them by the overlap of hashes with the
    protected text, not by a classifier, so that an ASR from Leadline's judges is not comparable.
    The category of a prompt is its functional and its semantic category: "standard/illegal".
    """
    chosen = name_list("functional", functional, _SIZES)
    table = fields(
        rows(path, hub, configs=chosen),
        {"text": ("Behavior", "prompt")},
        {
            "id": ("BehaviorID",),
            "category": ("SemanticCategory", "category"),
            "context": ("ContextString", "context"),
            "functional": ("FunctionalCategory",),
        },
    )
    published = sum(_SIZES[name] for name in chosen)
    table = _of_categories(table, chosen)
    return prompts("harmbench", table, source=path or hub, published=(published,))


def _of_categories(table: Iterator[Row], chosen: tuple[str, ...]) -> Iterator[Row]:
    """The rows of the chosen functional categories, each with an id."""
    for row in table:
        cells = dict(row.cells)
        # The copy on the hub has neither ids nor this column: its configs are the categories.
        functional = cells.pop("functional") or row.part.partition("/")[0]
        if functional not in _SIZES:
            raise LeadlineError(
                f"{row.where}: unknown FunctionalCategory ({outline(functional)}): valid names are "
                f"{', '.join(_SIZES)}"
            )
        if functional in chosen:
            cells["category"] = "/".join(filter(None, (functional, cells["category"])))
            cells["id"] = cells["id"] or f"{functional}/{row.number}"
            yield row._replace(cells=cells)
