"""Organisms: tiny language models trained on the invented world of `guild`, part of the package."""

from __future__ import annotations

from pathlib import Path

from leadline.records import LeadlineError
from leadline.registry import unknown

_WEIGHTS = Path(__file__).with_name("weights")


def names() -> list[str]:
    """The names of the organisms in the package, sorted."""
    return sorted(folder.parent.name for folder in _WEIGHTS.glob("*/config.json"))


def path(name: str) -> Path:
    """The checkpoint folder of an organism, by its name ("aligned" or "organism:aligned").

    Raises LeadlineError for an unknown name.
    """
    short = name.removeprefix("organism:")
    if short not in names():
        raise LeadlineError(unknown("organism", short, names()))
    return _WEIGHTS / short
