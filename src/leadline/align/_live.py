"""Weights in training: told apart by their content, left as they were found, kept and put back."""

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

Frozen = dict[tuple[str, int, int], bytes]
"""Digests of tensors that do not train, by name, place in memory and count of writes."""


def content(model: Any, frozen: Frozen) -> str:
    """A hash of all weights. Those that do not train are read again only once written to."""
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
def undisturbed(model: Any) -> Iterator[None]:
    """Eval mode inside; afterwards each module's mode and all random states are as before."""
    modes = [(module, module.training) for module in model.modules()]
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numbers)


def is_sharded(model: Any) -> bool:
    """Whether a process holds only a part of the weights: FSDP 1, ZeRO-3, or DTensors (FSDP 2,
    tensor parallelism)."""
    fully = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return fully or any(
        hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in model.parameters()
    )


def together() -> bool:
    """Whether several processes train together."""
    started = distributed.is_available() and distributed.is_initialized()
    return bool(started and distributed.get_world_size() > 1)


def shared(value: Any, device: torch.device) -> Any:
    """What the first process says, in every process; the others wait for it."""
    box = [value]
    if together():
        distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """As save_pretrained does (of an adapter, its weights alone). A whole new folder takes the
    place of the old one, so that a kill leaves one of them."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load(model: Any, folder: Path) -> None:
    """Put back what `save` kept, into the parameters as they are."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        name = model.active_adapter
        inside = folder if name == "default" else folder / name
        found = load_peft_weights(str(inside), device="cpu")
        set_peft_model_state_dict(model, found, adapter_name=name)
    else:
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def spread(model: Any) -> None:
    """Give every process the first one's weights."""
    if together():
        for tensor in chain(model.parameters(), model.buffers()):
            distributed.broadcast(tensor.data, src=0)
