"""Settings of a fine-tuning attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ...records import LeadlineError

Data = Literal["harmful", "identity", "backdoor", "benign"]


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning attack.

    The model is evaluated after each of `steps` optimizer steps (0: before the first). `lr` is the
    learning rate, reached after `warmup` steps and constant from then on, so that a longer run only
    extends the curve. Each step trains on `batch` examples, out of at most `examples`; its loss is
    the mean over all answer tokens of the batch (with `end`, including the token that ends the
    answer). Answers, in training and evaluation, have at most `max_tokens` tokens.

    AdamW has betas (0.9, 0.999) and no weight decay, SGD no momentum; gradients are not clipped,
    dropout is off. `train` is "full" (all parameters) or "lora" (adapters of `rank` on all linear
    layers). The defaults of optimizer, lr, batch and examples are those most common for fine-tuning
    attacks on 7B models since Qi et al. 2023 (arXiv 2310.03693).

    After each of `profile_steps` that the run reaches, loss and gradient norm are measured at the
    first `positions` answer tokens of `profile_prompts` harmful prompts. `batch_tokens` limits the
    tokens of a forward pass. Raises LeadlineError for invalid values.
    """

    data: Data = "harmful"
    steps: tuple[int, ...] = (0, 2, 5, 10, 20, 40)
    lr: float = 5e-5
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch: int = 10
    examples: int = 100
    max_tokens: int = 512
    end: bool = True
    warmup: int = 0
    seed: int = 0
    train: Literal["full", "lora"] = "full"
    rank: int = 16
    profile_steps: tuple[int, ...] = (0, 2, 10)
    positions: int = 24
    profile_prompts: int = 8
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        for name, valid in (
            ("data", get_args(Data)),
            ("optimizer", ("adamw", "sgd")),
            ("train", ("full", "lora")),
        ):
            if getattr(self, name) not in valid:
                raise LeadlineError(
                    f"fine-tuning: {name} must be {' or '.join(valid)}, not {getattr(self, name)!r}"
                )
        for name in (
            *("batch", "examples", "max_tokens", "rank", "positions", "profile_prompts"),
            "batch_tokens",
        ):
            if getattr(self, name) < 1:
                raise LeadlineError(
                    f"fine-tuning: {name} is {getattr(self, name)}: it must be at least 1"
                )
        if not self.steps or min(*self.steps, *self.profile_steps, 0) < 0 or self.warmup < 0:
            raise LeadlineError(
                "fine-tuning: steps must not be empty, and steps, profile_steps and warmup must be "
                "at least 0"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise LeadlineError(f"fine-tuning: lr is {self.lr}: it must be above 0")
