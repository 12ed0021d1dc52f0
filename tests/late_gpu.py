"""Tensors that say they are on cuda:0 where there is no GPU: what is copied from them arrives when the host waits for the stream.

For code that copies from a GPU to the host and does nothing else with it. Other operations on such a tensor raise.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

aten = torch.ops.aten


class OnGpu(torch.Tensor):
    """Holds a CPU tensor, and tells that its device is cuda:0."""

    gpu: LateGpu
    held: torch.Tensor

    @staticmethod
    def __new__(cls, gpu: LateGpu, held: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="cuda:0")
        made.gpu, made.held = gpu, held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return cls(args[0].gpu, args[0].held)
        if func is aten.copy_.default and isinstance(args[1], cls) and not isinstance(args[0], cls):
            target, source = args[0], args[1]
            source.gpu.copies.append((target, source.held))
            non_blocking = args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False)
            if not (non_blocking and target.data_ptr() in source.gpu.pinned):
                source.gpu.synchronize()
            return target
        raise NotImplementedError(f"{func} of a tensor on a GPU that is not there")


class LateGpu:
    """Stands in for torch's pinned memory and its current stream. `syncs` counts how often the host waited."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # launched, and not there yet
        self.pinned: set[int] = set()
        self.syncs = 0
        self._empty = torch.empty
        patch.setattr(torch, "empty", self._allocate)
        patch.setattr(torch.cuda, "current_stream", lambda device: self)
        patch.setattr(torch.cuda, "device", nullcontext)

    def tensor(self, held: torch.Tensor) -> OnGpu:
        """On the GPU; what is written to `held` later is what the GPU holds."""
        return OnGpu(self, held)

    def synchronize(self) -> None:
        self.syncs += 1
        while self.copies:
            target, source = self.copies.pop(0)
            target.copy_(source)

    def _allocate(self, *size: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = self._empty(*size, **kwargs)
        if pin_memory:
            made.fill_(0)
            self.pinned.add(made.data_ptr())
        return made
