"""The host plane: replies in POSIX shared memory, written by the teacher and read by the rank.

On the CPU the teacher writes in place and the rank reads in place. A GPU copies on a stream of its own, to and from memory that
its process has pinned. The teacher publishes a reply when its copy is complete, which a thread waits for. A rank gives a slot back
when its own copy is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from shmbridge.output_spec import Extent
from shmbridge.plane import cuda_ipc, cuda_runtime, tensors
from shmbridge.plane.base import LaneSpec, RankPlane, TeacherPlane
from shmbridge.plane.tensors import Slots
from shmbridge.shm import layout


class _Copies:
    """A GPU's stream for the copies of one lane, and an event for each slot."""

    def __init__(self, memory: memoryview, device: torch.device, slots: int) -> None:
        self.device = device
        self.stream = cuda_ipc.side_stream(device)
        self.done = [torch.cuda.Event(blocking=True) for _ in range(slots)]  # else a thread that waits would spin
        cuda_runtime.register(memory, self, device)


class TeacherHostPlane(TeacherPlane):
    """Teacher: the replies of one lane."""

    def __init__(self, spec: LaneSpec) -> None:
        """Attach the lane's reply segment. Raises AttachError."""
        self._slots, self._copies = _attach(spec)

    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None:
        if self._copies is None:
            self._slots.write(number, extent, outputs, position, row)
            return
        here = {name: tensor.to(self._copies.device, non_blocking=True) for name, tensor in outputs.items()}
        self._copies.stream.wait_stream(torch.cuda.current_stream(self._copies.device))
        with torch.cuda.stream(self._copies.stream):
            self._slots.write(number, extent, here, position, row)
        cuda_ipc.keep_until(here.values(), self._copies.stream)

    def seal(self, number: int) -> Callable[[], None] | None:
        if self._copies is None:
            return None
        done = self._copies.done[number % self._slots.count]
        done.record(self._copies.stream)
        return done.synchronize


class RankHostPlane(RankPlane):
    """Rank: the replies of its lane, in place on the CPU, copied to a GPU."""

    keeps = True

    def __init__(self, spec: LaneSpec) -> None:
        """Attach the lane's reply segment. Raises AttachError."""
        self._slots, self._copies = _attach(spec)
        self.lends = self._copies is None

    def read(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        if self._copies is None:
            return self._slots.lend(number, extent)
        views = self._slots.views(number, extent)
        device, stream = self._copies.device, self._copies.stream
        done = self._copies.done[number % self._slots.count]
        with torch.cuda.stream(stream):
            copies = {name: view.to(device, non_blocking=True) for name, view in views.items()}
            done.record(stream)
        compute = torch.cuda.current_stream(device)
        compute.wait_event(done)
        cuda_ipc.keep_until(copies.values(), compute)
        return copies

    def release(self, number: int) -> int | None:
        if self._copies is None:
            return self._slots.take_back(number)
        self._copies.done[number % self._slots.count].synchronize()  # this copy alone, not all that the GPU has to do
        return None


def _attach(spec: LaneSpec) -> tuple[Slots, _Copies | None]:
    """The lane's reply slots, and the copies to or from them where this process has a GPU."""
    count = spec.shape.reply_slots
    memory = spec.attach(spec.shape.reply_bytes(spec.agreed.outputs)).bytes
    slots = spec.slots(tensors.over(memory, layout.PAGE, "uint8", (count * spec.stride,)))
    return slots, _Copies(memory, spec.device, count) if spec.device.type == "cuda" else None
