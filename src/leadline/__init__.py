"""Leadline measures how deep a language model's safety alignment goes, and makes it deeper."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .analysis.results import Results, results
    from .comparison import Comparison, compare
    from .depth.run import DepthReport, measure_depth
    from .engine import run
    from .matters.answers import Answers, what_matters
    from .records import LeadlineError
    from .study import Study

# Read by OpenMP when torch is first imported, which only happens after this module: threads that
# spin while they wait slow down a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = [
    "Answers",
    "Comparison",
    "DepthReport",
    "LeadlineError",
    "Results",
    "Study",
    "__version__",
    "compare",
    "measure_depth",
    "results",
    "run",
    "what_matters",
]
_MODULES = {
    "Answers": "matters.answers",
    "Comparison": "comparison",
    "DepthReport": "depth.run",
    "LeadlineError": "records",
    "Results": "analysis.results",
    "Study": "study",
    "compare": "comparison",
    "measure_depth": "depth.run",
    "results": "analysis.results",
    "run": "engine",
    "what_matters": "matters.answers",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import leadline` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'leadline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"leadline.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
