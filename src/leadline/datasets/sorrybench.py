"""SORRY-Bench, https://github.com/SORRY-Bench/sorry-bench."""

from collections.abc import Iterator, Sequence

from leadline.records import LeadlineError, Prompt
from leadline.registry import dataset, unknown
from leadline.text import is_name

from .tables import Row, fields, name_list, prompts, rows

_STYLES = (
    "base", "question", "slang", "uncommon_dialects", "technical_terms", "role_play",
    "misspellings", "logical_appeal", "authority_endorsement", "misrepresentation",
    "evidence-based_persuasion", "expert_endorsement", "ascii", "caesar", "morse", "atbash",
    "translate-ml", "translate-ta", "translate-mr", "translate-zh-cn", "translate-fr",
)  # fmt: skip


def _outline(*, styles: str | Sequence[str] = "base", **options: object) -> Iterator[Prompt]:
    chosen = name_list("styles", styles)
    for style in _STYLES if "all" in chosen else chosen:
        mutation = "" if style == "base" else style
        for n in range(440):
            yield Prompt(f"{n}/{style}", "", "sorrybench", base=str(n), mutation=mutation)


@dataset(
    "sorrybench",
    source="Xie et al. 2024, arXiv:2406.14598",
    licence="custom",
    rows=440,
    outline=_outline,
)
def sorrybench(
    *,
    path: str | None = None,
    hub: str = "sorry-bench/sorry-bench-202503",
    styles: str | Sequence[str] = "base",
) -> Iterator[Prompt]:
    """440 harmful instructions in 44 categories, each also in 20 mutated styles.

    `styles` is "base", "all", or a list of styles. A mutated prompt has its style as `mutation`
    and its question as `base`.
    """
    chosen = name_list("styles", styles)
    required = {
        "question": ("question_id",),
        "text": ("turns", "prompt"),
        "category": ("category",),
        "style": ("prompt_style",),
    }
    table = fields(rows(path, hub, pattern="question*"), required)
    source = path or hub
    count = len(_STYLES) if "all" in chosen else len(chosen)
    published = (440 * count, 450 * count)  # 440 questions since 202503, 450 before
    table = _of_styles(table, chosen, source)
    return prompts("sorrybench", table, source=source, published=published)


def _of_styles(table: Iterator[Row], chosen: tuple[str, ...], source: str) -> Iterator[Row]:
    """The rows of the chosen styles. Raises LeadlineError for a style that has no rows."""
    found = set()
    for row in table:
        cells = dict(row.cells)
        style, question = cells.pop("style"), cells.pop("question")
        found.add(style)
        if style in chosen or "all" in chosen:
            cells |= {"id": f"{question}/{style}", "base": question}
            cells["mutation"] = "" if style == "base" else style
            yield row._replace(cells=cells)
    for style in chosen:
        if style not in found | {"all"}:
            raise LeadlineError(
                f"{source}: {unknown('style', style, {*filter(is_name, found), 'all'})}"
            )
