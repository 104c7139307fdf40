"""The training loop of a fine-tuning attack: loss, optimizer and order of the examples."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...models.checkpoint import Checkpoint
from ...models.memory import memory_errors
from ...models.weights import Weights
from ...records import LeadlineError
from ..tokenized import TokenizedPair, batches
from .config import FinetuneConfig
from .gradients import token_losses

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)


def load(checkpoint: Checkpoint, config: FinetuneConfig, device: str | None) -> Weights:
    """The weights in float32, all or only LoRA adapters trainable.

    Raises LeadlineError where the weights do not load, or are quantized and `train` is full.
    """
    weights = Weights.load(checkpoint.path, checkpoint.pinned, "float32", device)
    if config.train == "lora":
        weights.model = _adapted(weights.model, config)
        return weights
    for name, parameter in weights.model.named_parameters():
        if not parameter.is_floating_point():
            raise LeadlineError(
                f"model {checkpoint.name}: its weights are quantized ({name} first) and cannot be "
                "trained: set train: lora, or use the unquantized weights"
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
    model: Any, examples: Sequence[TokenizedPair], config: FinetuneConfig, last: int
) -> Iterator[tuple[int, float]]:
    """Train for `last` steps; yields (steps taken, loss of that step before its update), from
    (0, nan) on.

    Raises LeadlineError where memory runs out or training diverges.
    """
    import torch

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(weights, config.lr, BETAS, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(weights, config.lr)
    batch = _batches(examples, config)
    yield 0, math.nan
    for step in range(1, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, step / max(1, config.warmup))
        with memory_errors(
            f"out of memory in training step {step}: set a lower batch_tokens or max_tokens, "
            "optimizer: sgd, or train: lora"
        ):
            loss = _accumulate(model, next(batch), config.batch_tokens)
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(loss) or not all(bool(w.isfinite().all()) for w in weights):
                raise LeadlineError(
                    f"fine-tuning diverged in step {step} (loss {loss:.3g}): set a lower lr"
                )
        yield step, loss


def _accumulate(model: Any, batch: Sequence[TokenizedPair], batch_tokens: int) -> float:
    """Add the gradient of the batch's mean token loss, computed in parts of at most `batch_tokens`
    tokens. Returns that loss."""
    import torch

    tokens, total = sum(pair.answer for pair in batch), 0.0
    for part in batches(batch, batch_tokens):
        with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16, on_gpu(model)):
            loss = token_losses(model, part).sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def _batches(
    examples: Sequence[TokenizedPair], config: FinetuneConfig
) -> Iterator[list[TokenizedPair]]:
    """Endless batches; each pass over the examples has a new random order."""
    rng, queue = random.Random(config.seed), list[TokenizedPair]()
    size = min(config.batch, len(examples))
    while True:
        while len(queue) < size:
            queue += rng.sample(examples, len(examples))
        batch, queue = queue[:size], queue[size:]
        yield batch


def on_gpu(model: Any) -> bool:
    """Whether a model is on a CUDA device, where training runs in bfloat16."""
    return str(model.device).startswith("cuda")
