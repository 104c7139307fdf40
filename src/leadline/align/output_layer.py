"""Training with less memory: the output layer at learned tokens only, in chunks, and gradient
checkpointing of as many layers as a limit of memory requires. Both leave loss and gradients as they
are.

TRL's fused output layer already computes learned tokens only, in tiles, where Triton runs (CUDA,
XPU). Elsewhere it computes every position, padding and prompts included, in tiles of 512 MiB.
`use_learned_tokens` replaces it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import FusedCausalLMOutput

from .losses import logps_in_chunks
from .mixture import IGNORED

_TRITON = ("cuda", "xpu")
_ACTIVATIONS = 256 * 2**20


def use_learned_tokens(model: Any) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)` compute the output layer at learned
    tokens only, on devices where TRL's fused layer does not. Call it after TRL's trainer is built.

    A model whose logits are more than its output layer's result (soft-capped, scaled), or that has
    no output layer of its own, computes its logits as it always does, and they are selected
    afterwards.
    """
    base = _base(model)
    fused, separable = base.forward, ends_in_output_layer(base)

    @wraps(type(base).forward)  # `generate` validates its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        labels = inputs.get("labels")
        if not fused_lm_head or labels is None or labels.device.type in _TRITON:
            return fused(*args, fused_lm_head=fused_lm_head, **inputs)
        del inputs["labels"]
        inputs.pop("num_items_in_batch", None)
        mask = labels[:, 1:] != IGNORED
        features, head, outputs = learned_features(base, fused, mask, separable, *args, **inputs)
        values = logps_in_chunks(features, labels[:, 1:][mask], head)
        # masked_scatter keeps a micro-batch without learned tokens connected to the model.
        log_probs, entropy, is_top1 = (
            each.new_zeros(mask.shape).masked_scatter(mask, each) for each in values
        )
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=mask,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    base.forward = forward


def learned_features(
    model: Any, run: Any, mask: Tensor, separable: bool, *args: Any, **inputs: Any
) -> tuple[Tensor, Any, Any]:
    """The output layer's inputs at learned tokens [tokens, width], the output layer, and the
    outputs of `run(*args, **inputs)`, which is the model or its forward method.

    `mask` [rows, positions - 1] marks the positions whose next token is learned. `separable` is the
    result of `ends_in_output_layer`; where it is false, logits take the place of the inputs, and
    the identity that of the layer.
    """
    if separable:
        with without_output_layer(model):
            outputs = run(*args, **inputs)
        return outputs.logits[:, :-1][mask], _base(model).get_output_embeddings(), outputs
    if "logits_to_keep" in signature(type(_base(model)).forward).parameters:
        keep = mask.any(0).nonzero()[:, 0]  # positions that are learned in any row
        outputs = run(*args, **inputs, logits_to_keep=keep)
        if outputs.logits.size(1) == len(keep):  # not ignored by a mixin's signature
            return outputs.logits[mask[:, keep]], _identity, outputs
    else:
        outputs = run(*args, **inputs)
    return outputs.logits[:, :-1][mask], _identity, outputs


def ends_in_output_layer(model: Any) -> bool:
    """Whether the model's logits are exactly what its output layer returns.

    Measured: the layer's result is replaced by known numbers up to 100, which the model has to
    return unchanged. A model that soft-caps or scales its logits does not.
    """
    base = _base(model)
    head = base.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        return False
    known: list[Tensor] = []

    def replace(module: Any, inputs: Any, result: Tensor) -> Tensor:
        known.append(torch.linspace(-100, 100, result.numel()).view(result.shape).to(result))
        return known[-1]

    training = base.training
    handle = head.register_forward_hook(replace)
    try:
        base.eval()
        ids = torch.zeros(1, 2, dtype=torch.long, device=base.device)
        with torch.no_grad():
            logits = base.forward(input_ids=ids, use_cache=False).logits
        return len(known) == 1 and torch.equal(logits, known[0])
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # a model that needs other inputs
    finally:
        handle.remove()
        base.train(training)


@contextmanager
def without_output_layer(model: Any) -> Iterator[None]:
    """Within the block the model returns the inputs of its output layer as its logits."""
    head = _base(model).get_output_embeddings()
    own = head.__dict__.get("forward")  # set by adapters or offloading
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def checkpoint_layers(model: Any, limit: int | None = None) -> None:
    """Before every training batch, turn gradient checkpointing on for as many layers as keep the
    stored activations below `limit` bytes.

    The default is the size of the gradients, which do not exist yet when activations are at their
    peak, plus 256 MiB. A checkpointed layer is computed a second time in the backward pass.
    """
    base = _base(model)
    layers = [layer for layer in base.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        return
    if limit is None:
        trained = (p for p in model.parameters() if p.requires_grad)
        limit = _ACTIVATIONS + sum(p.numel() * p.element_size() for p in trained)
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    config = base.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    per_token = 4 * (8 * hidden + 3 * inner)  # bytes of one layer, estimated; about right for bf16

    def choose(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        given = inputs.get("input_ids")
        given = inputs.get("inputs_embeds") if given is None else given
        tokens = given.shape[:2].numel() if given is not None else 0
        stored = max(1, limit // max(1, tokens * per_token))
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < len(layers) - stored

    base.register_forward_pre_hook(choose, with_kwargs=True)


def _base(model: Any) -> Any:
    """The causal language model within a PEFT model and the wrapper of several processes."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if is_peft_model(model) else model


def _identity(logits: Tensor) -> Tensor:
    return logits
