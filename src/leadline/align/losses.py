"""The token-wise constrained objective of fine-tuning (arXiv 2406.05946, section 4).

Per response token t, with d = log pi(y_t) - log pi_reference(y_t):

    objective  (2 / b_t) * -log sigmoid(b_t * d)      gradient  -w_t * grad log pi(y_t)
    weight     w_t = 2 * sigmoid(-b_t * d)            at d = 0  (2 / b_t) * log 2, and w_t = 1

A large b_t keeps the token's probability close to the reference: its weight falls to 0 once
fine-tuning has made it more likely than under the reference. As b_t goes to 0, the objective minus
its constant (2 / b_t) log 2 becomes -d, which is cross-entropy up to a constant.

The paper's official code bounds the weight below by 1e-3. With a `floor` f, the objective is
continued linearly where its weight would fall below f, so that the gradient is exactly
-max(w_t, f) * grad log pi(y_t) and the loss remains the objective that is minimized:

    objective  (2 / b_t) * -log sigmoid(b_t * d_f) - f * (d - d_f)   where d > d_f
    with       d_f = log(2 / f - 1) / b_t                            w_t(d_f) = f

Pure functions of tensors, computed in float32 or higher precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BETA = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
"""The paper's schedule: b_t of the first token, of the four after it, and of all later ones."""

CHUNK = 64 * 2**20
"""Bytes of the logits that exist at a time."""


def positions(mask: Tensor) -> Tensor:
    """The position of every token in its response: from 1, and 0 where `mask` is false.

    A response is an unbroken run of true values along the last dimension of `mask` [..., tokens],
    so that counting restarts at every assistant turn and every sequence of a packed row.
    """
    seen = mask.long().cumsum(-1)
    return (seen - seen.masked_fill(mask, 0).cummax(-1).values) * mask


def occurrences(ids: Tensor, pattern: Sequence[int]) -> Tensor:
    """Which of `ids` [..., tokens] are part of an occurrence of `pattern`: bool, same shape."""
    import torch

    found = torch.zeros_like(ids, dtype=torch.bool)
    if 0 < len(pattern) <= ids.size(-1):
        starts = (ids.unfold(-1, len(pattern), 1) == ids.new_tensor(list(pattern))).all(-1)
        for offset in range(len(pattern)):
            found[..., offset : offset + starts.size(-1)] |= starts
    return found


def schedule(beta: Sequence[float], positions: Tensor) -> Tensor:
    """b_t at every position (from 1; 0 counts as 1), float32. The last value of `beta` applies to
    all later positions."""
    import torch

    values = torch.tensor(list(beta), dtype=torch.float32, device=positions.device)
    return values[(positions - 1).clamp(0, len(values) - 1)]


def in_chunks(
    function: Callable[..., Tensor], vocabulary: int, *inputs: Tensor, memory: int = CHUNK
) -> Tensor:
    """The concatenated results of `function` on slices of the inputs' first dimension (tokens),
    each with so few tokens that their logits (4 bytes each) fit in `memory` bytes.

    With more than one slice, a slice is computed again in the backward pass, so that the logits of
    one slice exist at a time.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    size = max(1, memory // (4 * vocabulary))
    if len(inputs[0]) <= size:
        return function(*inputs)
    slices = zip(*(each.split(size) for each in inputs), strict=True)
    return torch.cat([checkpoint(function, *each, use_reentrant=False) for each in slices])


def logps_in_chunks(
    features: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], memory: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi of the labels (differentiable), the entropy of the distributions (nats), and whether
    the label is the most likely token: each [tokens].

    The logits are `head(features)`, of features [tokens, width]; see `in_chunks` for `memory`.
    """
    import torch
    from torch.nn.functional import cross_entropy

    metrics: list[tuple[Tensor, Tensor]] = []
    recomputed = False

    def logps(features: Tensor, labels: Tensor) -> Tensor:
        logits = high_precision(head(features))
        losses = cross_entropy(logits, labels, reduction="none")
        if not recomputed:
            with torch.no_grad():
                total = losses + logits.gather(-1, labels[:, None])[:, 0]  # logsumexp
                mean = ((logits - total[:, None]).exp_() * logits).sum(-1)
                metrics.append((total - mean, logits.argmax(-1) == labels))
        return -losses

    vocabulary = getattr(head, "out_features", None) or features.size(-1)
    found = in_chunks(logps, vocabulary, features, labels, memory=memory)
    recomputed = True
    entropy, is_top1 = (torch.cat(part) for part in zip(*metrics, strict=True))
    return found, entropy, is_top1


def high_precision(logits: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    import torch

    return logits if logits.dtype == torch.float64 else logits.float()


def constrained_loss(
    logps: Tensor, reference: Tensor, beta: Tensor, mask: Tensor, floor: float = 0.0
) -> Tensor:
    """The objective per token, 0 where `mask` is false; all four tensors have one shape.

    Where b_t is 0, its limit without the constant: reference - logps. `floor`, from 0 to less than
    1, is the smallest weight.
    """
    from torch.nn.functional import logsigmoid

    gain = _gain(logps, reference, mask)
    is_zero = beta == 0
    b = beta.to(gain.dtype).masked_fill(is_zero, 1)
    if not floor:
        return (-(2 / b) * logsigmoid(b * gain)).where(~is_zero, -gain) * mask
    limit = math.log(2 / floor - 1) / b
    curved = -(2 / b) * logsigmoid(b * gain.where(gain <= limit, limit))
    linear = -floor * (gain - limit).relu()
    return (curved + linear).where(~is_zero, -gain) * mask


def gradient_weight(
    logps: Tensor, reference: Tensor, beta: Tensor, mask: Tensor, floor: float = 0.0
) -> Tensor:
    """max(w_t, floor), the factor by which the objective scales the gradient of each token's
    cross-entropy; 0 where `mask` is false. Shapes as in `constrained_loss`."""
    gain = _gain(logps, reference, mask)
    return (2 * (-beta.to(gain.dtype) * gain).sigmoid()).clamp(min=floor) * mask


def _gain(logps: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """d, and 0 outside of the mask, so that no masked value can turn a gradient into NaN."""
    import torch

    dtype = torch.promote_types(torch.promote_types(logps.dtype, reference.dtype), torch.float32)
    return (logps.to(dtype) - reference.to(dtype)).masked_fill(~mask, 0)
