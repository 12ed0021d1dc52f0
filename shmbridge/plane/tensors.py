"""Tensors in memory that two processes share: their dtypes, views of it, and how a reply lies in its slot.

A tensor over shared memory is made through NumPy, whose arrays pin the mapping; torch.frombuffer does not, and would leave a
pointer behind.

Where a rank reads its slots in place, their tensors are lent. Each slot has a version counter, which its lent tensors and
whatever autograd saves of them share. `take_back` raises it, so that a backward that comes too late raises an error instead
of reading what the teacher has written since.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import get_args

import numpy as np
import torch
from torch.autograd.graph import increment_version

from shmbridge.config import TorchDtype
from shmbridge.errors import AttachError, PlanError
from shmbridge.output_spec import Extent, OutputSpec
from shmbridge.shm import layout
from shmbridge.shm.segment import Segment

DTYPES: dict[TorchDtype, torch.dtype] = {name: getattr(torch, name) for name in get_args(TorchDtype)}
_NAMES: dict[torch.dtype, TorchDtype] = {dtype: name for name, dtype in DTYPES.items()}
_CARRIERS = {name: np.dtype("int16" if name == "bfloat16" else name) for name in DTYPES}

_NONE = Extent(0, 0)
_FIRST_VERSION = 1024  # above what in-place operations make of other tensors, so that an error of autograd tells ours


def attach(name: str, kind: int, nbytes: int, session_id: str, generation: int = 0, index: int = 0) -> Segment:
    """The existing segment `name`. Raises AttachError, also where it does not have `nbytes` bytes."""
    segment = Segment.attach(name, kind, session_id, generation, index)
    if segment.bytes.nbytes != nbytes:
        raise AttachError(f"segment {name} has {segment.bytes.nbytes} bytes, expected {nbytes}: garbled.")
    return segment


def over(memory: memoryview, offset: int, dtype: TorchDtype, dims: tuple[int, ...]) -> torch.Tensor:
    """A tensor of `dims` in place at `offset` bytes of `memory`.

    Never an inference tensor, even where it is first made within inference_mode: autograd may need it later.
    """
    with torch.inference_mode(False):
        if not prod(dims):
            return torch.empty(dims, dtype=DTYPES[dtype])
        array = np.frombuffer(memory, _CARRIERS[dtype], prod(dims), offset).reshape(dims)
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def dtype_name(dtype: torch.dtype, what: str) -> TorchDtype:
    """How a dtype is called in an offer. Raises PlanError, naming `what`, for one that cannot travel."""
    if dtype not in _NAMES:
        raise PlanError(f"{what} has the dtype {dtype}; a reply carries {', '.join(DTYPES)}.")
    return _NAMES[dtype]


class Slots:
    """`count` reply slots of `stride` bytes, seen as the tensors of `outputs`."""

    def __init__(self, outputs: tuple[OutputSpec, ...], count: int, stride: int, memory: torch.Tensor) -> None:
        """`memory`: (bytes,) uint8, at least all slots."""
        self.count = count
        self._outputs = outputs
        self._stride = stride
        with torch.inference_mode(False):  # inference tensors have no version counter
            slots = [memory[number * stride : (number + 1) * stride] for number in range(count)]
            self._memory = [slot.data for slot in slots]  # each with a version counter of its own
        for number, slot in enumerate(self._memory):
            increment_version([slot] * (_FIRST_VERSION + number))
        self._cached: list[tuple[Extent, dict[str, torch.Tensor]]] = [(_NONE, {})] * count

    def views(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        """Every output of reply (or chunk) `number`, in place. The dict is not to be changed.

        Raises:
            AttachError: `extent` is larger than a slot: a garbled request.
        """
        slot = number % self.count
        cached, views = self._cached[slot]
        if cached == extent:
            return views
        places = layout.reply_offsets(self._outputs, extent)
        if places[-1] > self._stride:
            raise AttachError(f"a reply for {extent} takes {places[-1]} bytes, its slot has {self._stride}: refused.")
        with torch.inference_mode(False):
            views = {}
            for spec, place in zip(self._outputs, places, strict=False):
                dims, dtype = spec.dims(extent), DTYPES[spec.dtype]
                memory = self._memory[slot][place : place + prod(dims) * dtype.itemsize]
                views[spec.name] = memory.view(dtype).view(dims)  # shares the slot's version counter
        self._cached[slot] = (extent, views)
        return views

    def lend(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        """Every output of reply (or chunk) `number`, in place, until `take_back`. Raises AttachError."""
        return {name: view.detach() for name, view in self.views(number, extent).items()}

    def take_back(self, number: int) -> int:
        """The memory of reply (or chunk) `number` may be written again: from now on a backward that needs it raises.

        Returns:
            The version that autograd expects then. Counters start one apart and grow by `count`, so no other reply had it.
        """
        memory = self._memory[number % self.count]
        version = memory._version
        increment_version([memory] * self.count)
        return version

    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None:
        """Copy `outputs`, in the offered dtype, into the reply, without waiting for a GPU. Outputs with a sequence axis go to
        `position` and on, outputs without one to `row` and on. Outputs that are not given are left as they are."""
        views = self.views(number, extent)
        for spec in self._outputs:
            source = outputs.get(spec.name)
            if source is None:
                continue
            target = views[spec.name]
            if source.shape != target.shape:  # a part of it, which lies in row-major order
                rest, first = (spec.shape[1:], position) if spec.per_token else (spec.shape, row)
                count = prod(source.shape[: source.ndim - len(rest)])
                target = target.view(-1, *rest)[first : first + count].view(source.shape)  # type: ignore[arg-type]
            target.copy_(source, non_blocking=True)
