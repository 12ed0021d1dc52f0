"""What an exception says of the GPU. CUDA's errors come as RuntimeErrors of several classes, so their text decides."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator, or the CPU's, which raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def is_sticky(error: BaseException) -> bool:
    """A CUDA error other than out of memory: no later call of CUDA in this process can succeed."""
    named = "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
    return isinstance(error, RuntimeError) and named and not is_out_of_memory(error)
