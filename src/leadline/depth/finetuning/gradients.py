"""How hard each answer token pulls at the weights: its loss, and the norm of its gradient.

The norm at position t is the L2 norm, over all trained parameters together, of the gradient of
-log p(y_t | prompt, y_<t) alone (Qi et al. 2025, arXiv 2406.05946, section 2.3). In an aligned
model that learns a harmful answer, the first tokens pull hardest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..tokenized import Row
from ..positions import Point, by_position

if TYPE_CHECKING:
    import torch

_CPU_MIB = 64  # of gradients at once: what a cache of today holds some of, by measurement
_log = logging.getLogger("leadline")


def token_losses(model: Any, batch: Sequence[Row]) -> torch.Tensor:
    """The loss of each answer token in nats, row after row: [answer tokens], float32 (float64 of a
    float64 model), to be differentiated.

    Padding stands on the right, where causal attention never looks, so no row sees another's.
    The head runs only from where the first answer begins.
    """
    import torch

    width = max(len(row.ids) for row in batch)
    first = min(len(row.ids) - row.answer for row in batch)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch])
    ids = ids.to(model.device)
    told = ids[:, :-1]
    out = model(
        input_ids=told,
        attention_mask=torch.ones_like(told),
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
    said = scores.gather(1, right[:, None])[:, 0]
    losses: torch.Tensor = scores.logsumexp(1) - said
    return losses


def gradient_norms(
    model: Any, row: Row, *, memory: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient norm of each answer token of one prompt: two of [answer tokens], float64.

    The prompt is read once and alone, so there is no padding. The backward passes of many tokens
    are one batched pass: as many at a time as have their gradients in `memory` bytes (None: 64 MiB
    on a processor, a quarter of what is free on a GPU). Where a model has an operation that cannot
    be batched, one token at a time.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    weights = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in weights)
    # The fused kernels have no batched backward.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        losses = token_losses(model, [row])
        many = max(1, min(len(losses), (memory or _bearable(losses.device)) // size))
        norms = []
        for chunk in torch.eye(len(losses), device=losses.device, dtype=losses.dtype).split(many):
            norms.append(_norms(losses, weights, chunk))
    return losses.detach().double().cpu(), torch.cat(norms).cpu()


def _norms(
    losses: torch.Tensor, weights: Sequence[torch.Tensor], chunk: torch.Tensor
) -> torch.Tensor:
    """Of the gradients of those losses that the rows of `chunk` pick: [rows], float64."""
    import torch

    def slopes(picks: torch.Tensor, batched: bool) -> torch.Tensor:
        found = torch.autograd.grad(
            losses, weights, picks, retain_graph=True, is_grads_batched=batched, allow_unused=True
        )
        norms = [
            torch.linalg.vector_norm(slope.reshape(len(chunk) if batched else 1, -1), dim=1)
            for slope in found
            if slope is not None
        ]
        return torch.stack(norms).double().norm(dim=0)

    if len(chunk) > 1:
        try:
            return slopes(chunk, True)
        except RuntimeError as error:
            _log.debug("gradients one token at a time: %s", str(error).partition("\n")[0])
    return torch.cat([slopes(pick, False) for pick in chunk])


def _bearable(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return _CPU_MIB * 2**20


def profile(
    model: Any, rows: Sequence[Row], positions: int
) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """Mean loss and mean gradient norm at the first `positions` tokens of the rows' answers."""
    import numpy as np

    values = np.full((2, len(rows), min(positions, max(row.answer for row in rows))), np.nan)
    for at, row in enumerate(rows):
        for found, into in zip(
            gradient_norms(model, cut(row, positions)), values[:, at], strict=True
        ):
            into[: len(found)] = found.numpy()
    bases = [row.prompt.base or row.prompt.id for row in rows]
    return by_position(values[0], bases), by_position(values[1], bases)


def cut(row: Row, tokens: int) -> Row:
    """A row with the first tokens of its answer alone: causal attention gives them the same."""
    less = max(0, row.answer - tokens)
    return Row(row.at, row.prompt, row.ids[: len(row.ids) - less], row.answer - less)
