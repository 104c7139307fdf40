"""Settings of `leadline deepen` and `leadline finetune`: training, and its evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..records import LeadlineError
from ..registry import unknown

_FINETUNING: dict[str, Any] = {
    "lr": 2e-5, "epochs": 3.0, "batch": 64, "warmup": 10, "optimizer": "adamw_torch",
    "adam_beta1": 0.5, "max_length": 512,
}  # fmt: skip

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "deepen": {
        "default": {},
        "paper": {
            "lr": 2e-5, "epochs": 10.0, "batch": 80, "warmup": 0, "optimizer": "adamw_torch",
            "adam_beta1": 0.9, "max_length": 512,
        },
    },
    "finetune": {
        "default": {"epochs": 3.0, "warmup": 10},
        "paper": _FINETUNING,
        "paper-harmful": {**_FINETUNING, "epochs": 25.0},
    },
}  # fmt: skip
"""Settings that differ from the defaults of TrainingConfig, by command and name of the preset.

`paper` has those of arXiv 2406.05946 and its official code for Llama-2-7B-Chat. Linear decay of the
learning rate, adam_beta2=0.999 and no weight decay are TRL's defaults. A batch of 80 rows has 16
safety rows, since their share is alpha (0.2).
"""


PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the trainer, as in TRL.

    `steps` is the number of optimizer steps (None: `epochs` epochs). A step takes `batch` rows,
    `micro` rows at a time. `lora` is the rank of adapters, which are trained in place of all
    weights and merged after training. `optimizer` is one of transformers' names
    ("adamw_torch_fused", "sgd", ...); `adam_beta1` is beta_1 of Adam and AdamW. The learning rate
    falls linearly to 0 after the warmup. `precision` is "float32", "bfloat16" (weights stay in
    float32, most operations run in bfloat16) or "auto": bfloat16 on a GPU, and on a CPU that has
    instructions for it. Raises LeadlineError for invalid values.
    """

    lr: float = 2e-5
    epochs: float = 10.0
    steps: int | None = None
    batch: int = 16
    micro: int | None = None
    warmup: int = 0
    optimizer: str = "adamw_torch_fused"
    adam_beta1: float = 0.9
    max_length: int = 1024
    lora: int | None = None
    seed: int = 0
    report_to: str = "none"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise LeadlineError(unknown("precision", self.precision, PRECISIONS))
        for name in ("lr", "epochs", "steps", "batch", "micro", "max_length", "lora"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LeadlineError(f"{name} is {value}: give a finite number above 0")
        if not 0 <= self.adam_beta1 < 1:
            raise LeadlineError(f"adam_beta1 is {self.adam_beta1}: give 0 or more, and less than 1")
        if self.warmup < 0:
            raise LeadlineError(f"warmup is {self.warmup}: give 0 or more steps")
        if not 0 <= self.seed < 2**32:
            raise LeadlineError(f"seed is {self.seed}: give a number from 0 to 2**32 - 1")
        if self.micro and self.batch % self.micro:
            raise LeadlineError(
                f"batch is {self.batch}, which is not a multiple of micro ({self.micro}): set "
                "micro to a divisor of batch"
            )

    @classmethod
    def preset(cls, command: str, name: str = "default", **settings: Any) -> TrainingConfig:
        """The settings of a command's preset (see PRESETS), replaced by those of `settings` that
        are not None.

        Raises LeadlineError for an unknown preset and for invalid values.
        """
        presets = PRESETS[command]
        if name not in presets:
            raise LeadlineError(unknown(f"preset of {command}", name, presets))
        names = {each.name for each in fields(cls)}
        explicit = {key: value for key, value in settings.items() if value is not None}
        if wrong := sorted(explicit.keys() - names):
            raise LeadlineError(unknown("training setting", wrong[0], names))
        return cls(**{**presets[name], **explicit})

    def arguments(self, folder: Path, *, small: bool = False) -> dict[str, Any]:
        """Arguments of an SFTConfig or a subclass; `folder` is for checkpoints. `small` is whether
        the model is so small that bfloat16 would not make it faster on a CPU.

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
        bf16 = gpu or (cpu_has_bfloat16() and not torch.accelerator.is_available() and not small)
        if self.precision != "auto":
            bf16 = self.precision == "bfloat16"
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
            "adam_beta1": self.adam_beta1,
            "max_length": self.max_length,
            "seed": self.seed,
            "bf16": bf16,
            "use_cpu": not torch.accelerator.is_available(),
            "gradient_checkpointing": gpu,
            "report_to": self.report_to,
            "save_strategy": "steps",
            "save_steps": 0.25,
            "save_total_limit": 1,
            "logging_steps": 10,
            "disable_tqdm": True,
            "dataloader_pin_memory": gpu,
        }


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies matrices in bfloat16 (AVX-512 BF16 or AMX)."""
    import torch

    # From PyTorch 2.11 on.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class EvaluationConfig:
    """How a model is evaluated before and after training: arguments of `before_after`.

    The default `dataset` is `guild` for organisms, and none for other models, which are then
    measured on harmless requests alone. `max_over_refusal` is the largest rise in over-refusal, in
    percentage points, without a warning.

    With `every`, a SafetyCallback also evaluates the model every so many steps during training;
    `stop_above` and `on_breach` (None: "warn") are the callback's. `target_asr`, in percent, ends
    training once the ASR after 1, 5 and 10 prefilled tokens is at most that and over-refusal has
    not risen by more than `max_over_refusal`. Raises LeadlineError for invalid values.
    """

    dataset: Any = None
    judge: Any = None
    limit: int | None = None
    max_tokens: int = 128
    only: tuple[str, ...] | None = None
    before_from: str | None = None
    max_over_refusal: float = 5.0
    every: int | None = None
    on_breach: str | None = None
    stop_above: Mapping[str, float] = field(default_factory=dict)
    target_asr: float | None = None

    def __post_init__(self) -> None:
        valid = ("warn", "stop", "rollback")
        if self.on_breach is not None and self.on_breach not in valid:
            raise LeadlineError(unknown("on_breach", self.on_breach, valid))
        if self.every is None and (self.on_breach in ("stop", "rollback") or self.stop_above):
            raise LeadlineError(
                "on_breach and stop_above need evaluation during training: set every to a number "
                "of steps (--watch)"
            )
        for name in ("max_over_refusal", "target_asr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise LeadlineError(f"{name} is {value}: give a number from 0 to 100")
        if self.max_tokens < 1:
            raise LeadlineError(f"max_tokens is {self.max_tokens}: give 1 or more")
