"""Loss and gradient norm of each answer token.

The norm at position t is the L2 norm, over all trained parameters together, of the gradient of
-log p(y_t | prompt, y_<t) alone (Qi et al. 2025, arXiv 2406.05946, section 2.3). In an aligned
model that is fine-tuned on harmful answers, the first tokens have the largest gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...models.memory import batch_memory
from ...report.depth.schema import Position
from ..positions import by_position
from ..tokenized import TokenizedPair

if TYPE_CHECKING:
    import torch

_CPU_MIB = 64  # gradients of one batched backward pass; the fastest value measured
_log = logging.getLogger("leadline")


def token_losses(model: Any, batch: Sequence[TokenizedPair]) -> torch.Tensor:
    """The loss of each answer token in nats, pair after pair: [answer tokens], differentiable,
    float32 (float64 for a float64 model).

    Padding is on the right, which causal attention never reads. The output layer runs only from
    the position where the first answer of the batch begins.
    """
    import torch

    width = max(len(row.ids) for row in batch)
    first = min(len(row.ids) - row.answer for row in batch)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch])
    ids = ids.to(model.device)
    inputs = ids[:, :-1]
    out = model(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        use_cache=False,
        logits_to_keep=width - first,
    )
    logits = out.logits if out.logits.dtype == torch.float64 else out.logits.float()
    ends = zip(logits, ids, batch, strict=True)
    parts = [
        (scores[len(row.ids) - row.answer - first : len(row.ids) - first], right[: len(row.ids)])
        for scores, right, row in ends
    ]
    scores = torch.cat([part for part, _ in parts])
    right = torch.cat([r[-row.answer :] for (_, r), row in zip(parts, batch, strict=True)])
    target_scores = scores.gather(1, right[:, None])[:, 0]
    losses: torch.Tensor = scores.logsumexp(1) - target_scores
    return losses


def gradient_norms(
    model: Any, pair: TokenizedPair, *, memory: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient norm of each answer token of one prompt: two of [answer tokens], float64.

    There is one forward pass, without padding. A batched backward pass covers as many tokens as
    have gradients that fit in `memory` bytes (None: 64 MiB on a CPU, a quarter of the free memory
    on a GPU). Where the model has an operation that cannot be batched, tokens are processed one at
    a time.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    weights = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in weights)
    # The fused kernels have no batched backward.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        losses = token_losses(model, [pair])
        at_once = max(
            1, min(len(losses), (memory or batch_memory(losses.device, _CPU_MIB * 2**20)) // size)
        )
        one_hot = torch.eye(len(losses), device=losses.device, dtype=losses.dtype)
        norms = [_norms(losses, weights, chunk) for chunk in one_hot.split(at_once)]
    return losses.detach().double().cpu(), torch.cat(norms).cpu()


def _norms(
    losses: torch.Tensor, weights: Sequence[torch.Tensor], chunk: torch.Tensor
) -> torch.Tensor:
    """Norms of the gradients of the losses selected by the one-hot rows of `chunk`: [rows],
    float64."""
    import torch

    def norms_of(rows: torch.Tensor, batched: bool) -> torch.Tensor:
        gradients = torch.autograd.grad(
            losses, weights, rows, retain_graph=True, is_grads_batched=batched, allow_unused=True
        )
        norms = [
            torch.linalg.vector_norm(gradient.reshape(len(chunk) if batched else 1, -1), dim=1)
            for gradient in gradients
            if gradient is not None
        ]
        return torch.stack(norms).double().norm(dim=0)

    if len(chunk) > 1:
        try:
            return norms_of(chunk, True)
        except RuntimeError as error:
            _log.debug("gradients one token at a time: %s", str(error).partition("\n")[0])
    return torch.cat([norms_of(row, False) for row in chunk])


def profile(
    model: Any, pairs: Sequence[TokenizedPair], positions: int
) -> tuple[tuple[Position, ...], tuple[Position, ...]]:
    """Mean loss (nats) and mean gradient norm at the first `positions` answer tokens of `pairs`."""
    import numpy as np

    length = min(positions, max(pair.answer for pair in pairs))
    values = np.full((2, len(pairs), length), np.nan)
    for row, pair in enumerate(pairs):
        for measure, by_token in enumerate(gradient_norms(model, pair.truncated(positions))):
            values[measure, row, : len(by_token)] = by_token.numpy()
    bases = [pair.base for pair in pairs]
    return by_position(values[0], bases), by_position(values[1], bases)
