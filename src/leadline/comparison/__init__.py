"""Compare two models on the same prompts: is the candidate no worse than the baseline?

sides.py reads what each model did (from a store or a baseline file), pairs.py lines up the prompts
that both were scored on, gate.py computes paired differences and decides, power.py says before a
run what it could decide, formats.py writes the result for people and for release pipelines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gate import Comparison
from .sides import Side

__all__ = ["Comparison", "compare"]


def compare(
    baseline: str | Path,
    candidate: str | Path,
    margin: float,
    judge: str | None = None,
    **rest: Any,
) -> Comparison:
    """Decide whether the candidate is no worse than the baseline by more than `margin` (a share).

    Both are a results folder, FOLDER::MODEL, or a baseline file. `rest` are the options of
    `leadline.comparison.gate.compare`. Raises LeadlineError where they cannot be compared.
    """
    from . import gate

    one, other = Side.read(str(baseline), judge), Side.read(str(candidate), judge)
    return gate.compare(one, other, margin, **rest)
