"""Out-of-memory errors of Python, torch's allocators and accelerators, recognized without torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..records import LeadlineError

if TYPE_CHECKING:
    import torch

# torch raises a plain RuntimeError where the CPU allocator fails (the text depends on the operating
# system), and for backends such as MPS.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory: you tried to allocate",
    "out of memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error reports that host or accelerator memory is exhausted.

    An error that only mentions memory, such as "an illegal memory access", does not count.
    """
    if isinstance(error, MemoryError):
        return True
    # If torch was not imported, the error is not one of its own: no need to import it.
    torch_error = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    if torch_error is not None and isinstance(error, torch_error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Raise an out-of-memory error of the block as LeadlineError(message); others pass through."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise LeadlineError(message) from error
        raise


def batch_memory(device: torch.device, cpu: int) -> int:
    """Bytes that one batch may use: a quarter of a CUDA device's free memory, elsewhere `cpu`."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return cpu
