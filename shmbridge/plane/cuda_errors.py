"""What an exception says of the GPU. CUDA's errors come as RuntimeErrors of several classes, so their text decides."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = (
    "can't allocate memory",  # the CPU
    "CUDA error: out of memory",  # CUDA itself, where it loads a kernel or pins memory
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """torch's allocator on the GPU, or another one, which raises a plain RuntimeError."""
    found = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return found or any(text in str(error) for text in _OUT_OF_MEMORY)


def is_sticky(error: BaseException) -> bool:
    """A CUDA error other than out of memory: no later call of CUDA in this process can succeed."""
    named = "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
    return isinstance(error, RuntimeError) and named and not is_out_of_memory(error)
