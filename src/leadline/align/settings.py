"""How a model is trained, and what it is asked before, on the way and after."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import LeadlineError
from ..registry import unknown


@dataclass(frozen=True)
class Training:
    """Settings of the trainer, as in TRL. `steps` bounds the optimiser steps (None: whole epochs);
    a step takes `batch` rows, `micro` at once. `lora` trains adapters of that rank, which are
    merged in the end. `optimizer` is one of transformers' names ("adamw_torch", "sgd", ...)."""

    lr: float = 2e-5
    epochs: float = 10.0
    steps: int | None = None
    batch: int = 16
    micro: int | None = None
    warmup: int = 0
    optimizer: str = "adamw_torch"
    max_length: int = 1024
    lora: int | None = None
    seed: int = 0
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "steps", "batch", "micro", "max_length", "lora"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LeadlineError(f"{name} is {value}: give a finite number above 0")
        if self.warmup < 0:
            raise LeadlineError(f"warmup is {self.warmup}: give 0 or more steps")
        if not 0 <= self.seed < 2**32:
            raise LeadlineError(f"seed is {self.seed}: give a number from 0 to 2**32 - 1")
        if self.micro and self.batch % self.micro:
            raise LeadlineError(
                f"a batch of {self.batch} rows can't be made of {self.micro} at once: give a "
                "divisor of it"
            )

    def arguments(self, folder: Path) -> dict[str, Any]:
        """For an SFTConfig or one of its kind. Raises LeadlineError for names that transformers
        does not know, or whose package is not installed."""
        import torch
        from transformers.integrations import get_available_reporting_integrations
        from transformers.training_args import OptimizerNames

        optimizers = [name.value for name in OptimizerNames]
        if self.optimizer not in optimizers:
            raise LeadlineError(unknown("optimizer", self.optimizer, optimizers))
        loggers = ("none", "all", *get_available_reporting_integrations())
        if self.report_to not in loggers:
            raise LeadlineError(
                f"report_to is {self.report_to!r}, which is not installed: pip install it, or give "
                f"one of {', '.join(loggers)}"
            )
        if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
            # The trainer would spread each batch over all of them, and make it that much larger.
            raise LeadlineError(
                f"{torch.cuda.device_count()} GPUs are visible, and this trains on one: set "
                "CUDA_VISIBLE_DEVICES=0, or launch the trainers of leadline.align with accelerate"
            )
        gpu = torch.cuda.is_available()
        micro = self.micro or self.batch
        return {
            "output_dir": str(folder),
            "learning_rate": self.lr,
            "num_train_epochs": self.epochs,
            "max_steps": self.steps or -1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.batch // micro,
            "warmup_steps": self.warmup,
            "optim": self.optimizer,
            "max_length": self.max_length,
            "seed": self.seed,
            "bf16": gpu,
            "gradient_checkpointing": gpu,
            "report_to": self.report_to,
            "save_strategy": "steps",
            "save_steps": 0.25,
            "save_total_limit": 1,
            "logging_steps": 10,
            "disable_tqdm": True,
            "dataloader_pin_memory": gpu,
        }


@dataclass(frozen=True)
class Exam:
    """What the model is asked before and after: `before_after`'s arguments. Under `every`, a
    SafetyCallback also asks it on the way, and does `on_breach` where a bound is passed."""

    dataset: Any = "guild"
    judge: Any = None
    limit: int | None = None
    max_tokens: int = 128
    every: int | None = None
    on_breach: str = "warn"
    stop_above: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_breach not in (valid := ("warn", "stop", "rollback")):
            raise LeadlineError(unknown("on_breach", self.on_breach, valid))
        if self.every is None and (self.on_breach != "warn" or self.stop_above):
            raise LeadlineError(
                "a breach is found where the model is watched: say every how many steps (--watch)"
            )
