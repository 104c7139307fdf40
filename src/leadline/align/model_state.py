"""The state of a model during training: hash its weights, evaluate it without side effects, save
and restore its weights, and share values between distributed processes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

FrozenHashes = dict[tuple[str, int, int], bytes]
"""Cached hashes of tensors that are not trained, by name, data pointer and version counter."""


def weights_hash(model: Any, frozen: FrozenHashes) -> str:
    """A hash of all parameters and buffers.

    Hashes of tensors that are not trained are cached in `frozen`; a write to such a tensor changes
    its version counter, so that it is hashed again.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        key = (name, tensor.data_ptr(), tensor._version)
        part = None if tensor.requires_grad else frozen.get(key)
        if part is None:
            flat = tensor.detach().reshape(-1).view(torch.uint8).cpu()
            part = blake2b(flat.numpy().data, digest_size=16).digest()
            if not tensor.requires_grad:
                frozen[key] = part
        digest.update(name.encode() + part)
    return digest.hexdigest()


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put the model into eval mode; on exit restore every module's mode and the random states of
    torch, numpy and Python."""
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def is_sharded(model: Any) -> bool:
    """Whether a process holds only a part of the weights: FSDP 1, ZeRO-3, or DTensors (FSDP 2,
    tensor parallelism)."""
    fsdp = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return fsdp or any(
        hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in model.parameters()
    )


def is_distributed() -> bool:
    """Whether several processes train together."""
    started = distributed.is_available() and distributed.is_initialized()
    return bool(started and distributed.get_world_size() > 1)


def broadcast(value: Any, device: torch.device) -> Any:
    """The first process's value, in every process. Blocks until the first process calls it."""
    box = [value]
    if is_distributed():
        distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]


def save_weights(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer with save_pretrained (of a PEFT model, the adapter alone).

    They are written to a new folder that then replaces the old one, so that an interrupted call
    leaves one complete folder.
    """
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load_weights(model: Any, folder: Path) -> None:
    """Load weights written by `save_weights` into the model's existing parameters."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        name = model.active_adapter
        adapter_folder = folder if name == "default" else folder / name
        weights = load_peft_weights(str(adapter_folder), device="cpu")
        set_peft_model_state_dict(model, weights, adapter_name=name)
    else:
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def broadcast_weights(model: Any) -> None:
    """Copy the first process's weights to all processes."""
    if is_distributed():
        for tensor in chain(model.parameters(), model.buffers()):
            distributed.broadcast(tensor.data, src=0)
