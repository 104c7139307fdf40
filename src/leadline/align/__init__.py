"""Training that keeps or deepens safety alignment: drop-in TRL trainers and a safety callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import SafetyCallback
    from .distill import ConstrainedDistillConfig, ConstrainedDistillTrainer
    from .recovery import RecoveryConfig, RecoveryTrainer
    from .trainers import ConstrainedSFTConfig, ConstrainedSFTTrainer

__all__ = [
    "ConstrainedDistillConfig",
    "ConstrainedDistillTrainer",
    "ConstrainedSFTConfig",
    "ConstrainedSFTTrainer",
    "RecoveryConfig",
    "RecoveryTrainer",
    "SafetyCallback",
]
_HOMES = {
    "ConstrainedDistillConfig": "distill",
    "ConstrainedDistillTrainer": "distill",
    "ConstrainedSFTConfig": "trainers",
    "ConstrainedSFTTrainer": "trainers",
    "RecoveryConfig": "recovery",
    "RecoveryTrainer": "recovery",
    "SafetyCallback": "callback",
}


def __getattr__(name: str) -> Any:
    """Load on first use: torch and TRL come with the first trainer."""
    if name not in _HOMES:
        raise AttributeError(f"module 'leadline.align' has no attribute {name!r}")
    from importlib import import_module

    try:
        home = import_module(f"leadline.align.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("accelerate", "datasets", "peft", "torch", "transformers", "trl"):
            raise
        from ..records import LeadlineError

        raise LeadlineError(
            f"leadline.align.{name} needs {error.name}: pip install 'leadline[train]'"
        ) from None
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
