"""The training loop of a fine-tuning attack: nothing but the loss, the optimizer and the order."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...models.weights import Weights
from ...records import LeadlineError
from .gradients import token_losses
from ...models.checkpoint import Checkpoint
from ..tokenized import Row, batches

if TYPE_CHECKING:
    import torch

    from .config import FinetuneConfig

BETAS = (0.9, 0.999)


def load(home: Checkpoint, config: FinetuneConfig, device: str | None) -> Weights:
    weights = Weights.load(home.path, home.pinned, "float32", device)
    if config.train == "lora":
        weights.model = _adapted(weights.model, config)
        return weights
    for name, parameter in weights.model.named_parameters():
        if not parameter.is_floating_point():
            raise LeadlineError(
                f"model {home.name}: its weights are quantized ({name} first), so they cannot be "
                "trained: set train: lora, or give the full weights"
            )
        parameter.requires_grad_(True)
    return weights


def _adapted(model: Any, config: FinetuneConfig) -> Any:
    import torch

    try:
        import peft
    except ImportError:
        raise LeadlineError("train: lora needs peft: pip install 'leadline[train]'") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        wanted = peft.LoraConfig(
            r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear"
        )
        return peft.get_peft_model(model, wanted).eval()


def training(
    model: Any, learned: Sequence[Row], config: FinetuneConfig, last: int
) -> Iterator[tuple[int, float]]:
    """The number of steps taken, and the loss of the last one before it was taken; from 0 on."""
    import torch

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(weights, config.lr, BETAS, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(weights, config.lr)
    drawn = _batches(learned, config)
    yield 0, math.nan
    for step in range(1, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, step / max(1, config.warmup))
        with memory(f"training step {step}", "set a lower batch_tokens or max_tokens"):
            loss = _accumulate(model, next(drawn), config.batch_tokens)
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(loss) or not all(bool(w.isfinite().all()) for w in weights):
                raise LeadlineError(
                    f"fine-tuning diverged in step {step}, at a loss of {loss:.3g}: set a lower lr"
                )
        yield step, loss


def _accumulate(model: Any, batch: Sequence[Row], batch_tokens: int) -> float:
    """Add the gradient of the batch's mean token loss, part by part. Returns that loss."""
    import torch

    tokens, total = sum(row.answer for row in batch), 0.0
    for part in batches(batch, batch_tokens):
        with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16, on_gpu(model)):
            loss = token_losses(model, part).sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def _batches(learned: Sequence[Row], config: FinetuneConfig) -> Iterator[list[Row]]:
    """Batches without end: every lesson once, in an order drawn by lot, then all anew."""
    draw, waiting = random.Random(config.seed), list[Row]()
    size = min(config.batch, len(learned))
    while True:
        while len(waiting) < size:
            waiting += draw.sample(learned, len(learned))
        batch, waiting = waiting[:size], waiting[size:]
        yield batch


def on_gpu(model: Any) -> bool:
    return str(model.device).startswith("cuda")


@contextmanager
def memory(what: str, mend: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise LeadlineError(
                f"out of memory in {what}: {mend}, take optimizer: sgd, or train: lora"
            ) from error
        raise
