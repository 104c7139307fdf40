"""Settings of `leadline deepen` and `leadline finetune`: training, and its evaluation."""

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
class TrainingConfig:
    """Settings of the trainer, as in TRL.

    `steps` is the number of optimizer steps (None: `epochs` epochs). A step takes `batch` rows,
    `micro` rows at a time. `lora` is the rank of adapters, which are trained in place of all
    weights and merged after training. `optimizer` is one of transformers' names ("adamw_torch",
    "sgd", ...). Raises LeadlineError for invalid values.
    """

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
                f"batch is {self.batch}, which is not a multiple of micro ({self.micro}): set "
                "micro to a divisor of batch"
            )

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Arguments of an SFTConfig or a subclass; `folder` is for checkpoints.

        Raises LeadlineError for an optimizer or logger that transformers does not know or that is
        not installed, and where several GPUs are visible.
        """
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
            # The trainer would use them for data parallelism, which multiplies the batch size.
            raise LeadlineError(
                f"{torch.cuda.device_count()} GPUs are visible, and this command trains on one: "
                "set CUDA_VISIBLE_DEVICES=0, or launch the trainers of leadline.align with "
                "accelerate"
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
class EvaluationConfig:
    """How a model is evaluated before and after training: arguments of `before_after`.

    With `every`, a SafetyCallback also evaluates it every so many steps during training;
    `stop_above` and `on_breach` are the callback's. Raises LeadlineError for invalid values.
    """

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
                "on_breach and stop_above need evaluation during training: set every to a number "
                "of steps (--watch)"
            )
