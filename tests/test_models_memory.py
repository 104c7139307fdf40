"""Recognizing out-of-memory errors among other errors, without an import of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from leadline.models.memory import memory_errors, out_of_memory
from leadline.records import LeadlineError

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def failed_allocation() -> RuntimeError:
    """The error of torch's CPU allocator for 1 EiB."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def memory_exhausted() -> list[Exception]:
    return [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        torch.OutOfMemoryError(),  # recognized by its class, whatever its message
        failed_allocation(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    ]


def other_errors() -> list[Exception]:
    return [
        RuntimeError(ILLEGAL),
        RuntimeError("size mismatch"),
        ValueError("out of memory"),
        LeadlineError("out of memory on 4 prompts"),
    ]


def test_the_cpu_allocator_raises_a_plain_runtime_error() -> None:
    error = failed_allocation()
    assert type(error) is RuntimeError
    assert "DefaultCPUAllocator" in str(error)


def test_exhausted_memory_is_recognized() -> None:
    assert [out_of_memory(error) for error in memory_exhausted()] == [True] * 6


def test_other_errors_are_not_out_of_memory() -> None:
    assert [out_of_memory(error) for error in other_errors()] == [False] * 4
    assert not out_of_memory(KeyboardInterrupt())


def test_memory_errors_become_leadline_errors() -> None:
    for error in memory_exhausted():
        with (
            pytest.raises(LeadlineError, match=r"^set a lower batch_size$") as caught,
            memory_errors("set a lower batch_size"),
        ):
            raise error
        assert caught.value.__cause__ is error


def test_other_errors_pass_through() -> None:
    for error in other_errors():
        with pytest.raises(type(error)) as caught, memory_errors("set a lower batch_size"):
            raise error
        assert caught.value is error
    with memory_errors("not raised"):
        pass


def test_torch_is_not_imported() -> None:
    script = """
import sys
from leadline.models.memory import out_of_memory
print(out_of_memory(MemoryError()), out_of_memory(RuntimeError("other")), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True False False\n", "")
