"""Settings of a fine-tuning attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ...records import LeadlineError

Data = Literal["harmful", "identity", "backdoor", "benign"]


@dataclass(frozen=True)
class FinetuneConfig:
    """`steps` are those after which the model is asked. `lr` rises over `warmup` steps and stays,
    so that more steps only add to a curve. A step learns from `batch` of at most `examples`
    lessons; its loss is the mean over all answer tokens of the batch, with `end` the token that
    ends the answer, too. Answers, learned or given, have at most `max_tokens`.

    AdamW has betas (0.9, 0.999) and no weight decay, SGD no momentum; nothing is clipped, dropout
    is off. "full" trains all parameters, "lora" adapters of `rank` on all linear layers. Optimizer,
    lr, batch and examples are those that most work since Qi et al. 2023 attacks 7B models with.

    After those `profile_steps` that come to pass, loss and gradient norm are taken at the first
    `positions` answer tokens of `profile_prompts` harmful pairs. `batch_tokens` bounds how many
    tokens one pass holds.
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
                    f"fine-tuning: {name} is {' or '.join(valid)}, not {getattr(self, name)!r}"
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
            raise LeadlineError("fine-tuning: steps are numbers from 0 on: give at least one")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise LeadlineError(f"fine-tuning: lr is {self.lr}: it must be above 0")
