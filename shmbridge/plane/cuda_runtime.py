"""What both planes need of the CUDA runtime: host memory that a GPU copies to and from by itself, and what an exception says."""

from __future__ import annotations

import weakref
from contextlib import suppress

import numpy as np
import torch

from shmbridge.log import logger

_OUT_OF_MEMORY = (
    "can't allocate memory",  # the CPU
    "CUDA error: out of memory",  # CUDA itself, where it loads a kernel or pins memory
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)


def register(memory: memoryview, keeper: object, device: torch.device) -> bool:
    """Pin `memory` until `keeper` is gone. False, with a warning, where CUDA refuses (confidential computing, a limit on locked
    memory): copies then go through CUDA's own buffers, slower, and the host waits for them."""
    runtime = torch.cuda.cudart()
    address = np.frombuffer(memory, np.uint8).ctypes.data
    with torch.cuda.device(device):  # else CUDA would make a context on the current one
        error = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if error:
        with suppress(RuntimeError):  # the next launch reports what this call left behind, whoever launches
            torch.zeros(1, device=device)
        logger.warning("CUDA did not pin %d bytes of shared memory (error %d); copies are slower", memory.nbytes, error)
        return False
    weakref.finalize(keeper, lambda memory: runtime.cudaHostUnregister(address), memory)  # the mapping outlives it
    return True


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a CUDA tensor in pinned host memory. The host waits until the current stream of the tensor's device has come to
    its end."""
    with torch.cuda.device(tensor.device):  # else CUDA would make a context on the current one
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
    return host


def is_out_of_memory(error: BaseException) -> bool:
    """torch's allocator on the GPU, or another one, which raises a plain RuntimeError."""
    found = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return found or any(text in str(error) for text in _OUT_OF_MEMORY)


def is_sticky(error: BaseException) -> bool:
    """A CUDA error other than out of memory: no later call of CUDA in this process can succeed."""
    named = "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
    return isinstance(error, RuntimeError) and named and not is_out_of_memory(error)
