"""Training that deepens or keeps safety alignment: TRL trainers and a safety callback."""

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
_MODULES = {
    "ConstrainedDistillConfig": "distill",
    "ConstrainedDistillTrainer": "distill",
    "ConstrainedSFTConfig": "trainers",
    "ConstrainedSFTTrainer": "trainers",
    "RecoveryConfig": "recovery",
    "RecoveryTrainer": "recovery",
    "SafetyCallback": "callback",
}


def __getattr__(name: str) -> Any:
    """Import a class on first access, so that importing the package does not load torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'leadline.align' has no attribute {name!r}")
    from importlib import import_module

    try:
        module = import_module(f"leadline.align.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("accelerate", "datasets", "peft", "torch", "transformers", "trl"):
            raise
        from ..records import LeadlineError

        raise LeadlineError(
            f"leadline.align.{name} needs {error.name}: pip install 'leadline[train]'"
        ) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
