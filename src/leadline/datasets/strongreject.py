"""StrongREJECT, https://github.com/alexandrasouly/strongreject."""

from collections.abc import Iterator

from leadline.records import Prompt
from leadline.registry import dataset

from .tables import fields, prompts, rows


@dataset("strongreject", source="Souly et al. 2024, arXiv:2402.10260", licence="MIT", rows=313)
def strongreject(
    *, path: str | None = None, hub: str = "walledai/StrongREJECT"
) -> Iterator[Prompt]:
    """313 specific, answerable harmful questions in six categories."""
    table = fields(
        rows(path, hub), {"text": ("forbidden_prompt", "prompt")}, {"category": ("category",)}
    )
    return prompts("strongreject", table, source=path or hub, published=(313,))
