"""Leadline sounds the depth of a language model's safety alignment, and deepens it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.results import Results, results
    from .depth.measure import depth
    from .engine import run
    from .records import LeadlineError
    from .study import Study

__version__ = "0.1.0"
__all__ = ["LeadlineError", "Results", "Study", "__version__", "depth", "results", "run"]
_HOMES = {
    "LeadlineError": "records",
    "Results": "analysis.results",
    "Study": "study",
    "results": "analysis.results",
    "depth": "depth",
    "run": "engine",
}


def __getattr__(name: str) -> Any:
    """Load on first use: `import leadline` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'leadline' has no attribute {name!r}")
    from importlib import import_module

    home = import_module(f"leadline.{_HOMES[name]}")
    return home if name == "depth" else getattr(home, name)  # that package can be called


def __dir__() -> list[str]:
    return sorted(__all__)
