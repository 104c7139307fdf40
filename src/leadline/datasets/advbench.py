"""AdvBench's harmful behaviors, https://github.com/llm-attacks/llm-attacks."""

from collections.abc import Iterator

from leadline.records import Prompt
from leadline.registry import dataset

from .tables import fields, prompts, rows


@dataset("advbench", source="Zou et al. 2023, arXiv:2307.15043", licence="MIT", rows=520)
def advbench(*, path: str | None = None, hub: str = "walledai/AdvBench") -> Iterator[Prompt]:
    """520 harmful instructions, each with the start of an affirmative answer."""
    table = fields(rows(path, hub), {"text": ("goal", "prompt")}, {"target": ("target",)})
    return prompts("advbench", table, source=path or hub, published=(520,))
