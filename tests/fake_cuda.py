"""A stand-in for shmbridge.plane.cuda_ipc where there is no GPU: memory and events that other processes open by their handles.

Memory is an anonymous file, an event is a word in one: how often it was recorded. Everything that is launched has come to
its end at once, so what is tested here is the protocol around the plane, over real processes: who records, publishes, waits
and releases in which order. `calls` holds what this process did.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Self

import numpy as np
import pytest
import torch

from shmbridge.plane import cuda, cuda_slab
from shmbridge.plane.cuda_ipc import MemoryHandle

_PAGE = 4096


class FakeEvent:
    def __init__(self, cuda: FakeCuda, number: int, memory: mmap.mmap, handle: bytes) -> None:
        self.cuda, self.number, self.handle = cuda, number, handle
        self.words = memoryview(memory).cast("Q")

    @property
    def recorded(self) -> int:
        return self.words[0]

    def record(self, stream: FakeStream) -> None:
        self.words[0] += 1
        self.cuda.calls.append(("record", self.number, stream.name))

    def elapsed_time(self, later: FakeEvent) -> float:
        return 0.0

    def query(self) -> bool:
        return not self.cuda.stands_still

    def synchronize(self) -> None:
        self.cuda.calls.append(("synchronize", self.number))


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def query(self) -> bool:
        return True

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.calls.append(("wait", event.number, self.name, event.recorded))

    def wait_stream(self, stream: FakeStream) -> None:
        self.cuda.calls.append(("wait_stream", stream.name, self.name))


class StandIn:
    """Has the names of the module that it stands in for: the part that all stand-ins share."""

    namespace = 1
    exports = 0

    def install(self, patch: pytest.MonkeyPatch) -> Self:
        """Take the module's place in the CUDA plane."""
        for module in (cuda, cuda_slab):
            patch.setattr(module, "cuda_ipc", self)
        return self

    def unusable(self, device: torch.device) -> str | None:
        return None

    def identify(self, device: torch.device) -> str:
        return "GPU-stand-in"

    def pid_namespace(self) -> int:
        return self.namespace

    def pinned(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.bool)


class FakeCuda(StandIn):
    """Everything is done at once, and other processes can open it."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.stands_still = False  # this process's host is told nothing by its GPU
        self._fds: dict[int, int] = {}  # by the address of the memory; also keeps the files open
        self._events = 0
        self._shared = 0
        self._current = FakeStream(self, "compute")
        self._sides = 0
        self._told: list[tuple[torch.Tensor, torch.Tensor]] = []

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        fd = os.memfd_create("fake-gpu")
        os.ftruncate(fd, nbytes)
        tensor = _tensor(mmap.mmap(fd, nbytes))
        self._fds[tensor.data_ptr()] = fd
        return tensor

    @property
    def made(self) -> int:
        """Events that other processes wait for, made or opened here, and side streams."""
        return self._shared + self._sides

    def export_memory(self, memory: torch.Tensor) -> MemoryHandle:
        self.exports += 1
        path = f"/proc/{os.getpid()}/fd/{self._fds[memory.data_ptr()]}"
        return MemoryHandle(path.encode(), memory.nbytes, 0, b"counter", self.exports, b"", False)

    def open_memory(self, handle: MemoryHandle, device: torch.device) -> torch.Tensor:
        return _tensor(_map(handle.handle))

    def shared_event(self, device: torch.device) -> FakeEvent:
        fd = os.memfd_create("fake-event")
        os.ftruncate(fd, _PAGE)
        self._fds[-fd] = fd
        return self._event(mmap.mmap(fd, _PAGE), f"/proc/{os.getpid()}/fd/{fd}".encode())

    def export_event(self, event: FakeEvent) -> bytes:
        return event.handle

    def open_event(self, handle: bytes, device: torch.device) -> FakeEvent:
        return self._event(_map(handle), handle)

    def timed_event(self) -> FakeEvent:
        return self._event(mmap.mmap(-1, _PAGE), b"")

    def _event(self, memory: mmap.mmap, handle: bytes) -> FakeEvent:
        self._events += 1
        self._shared += bool(handle)
        return FakeEvent(self, self._events, memory, handle)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self._current

    def side_stream(self, device: torch.device) -> FakeStream:
        self._sides += 1
        return FakeStream(self, f"side{self._sides}")

    @contextmanager
    def on(self, stream: FakeStream):
        before, self._current = self._current, stream
        try:
            yield before
        finally:
            self._current = before

    def keep_until(self, tensors: Iterable[torch.Tensor], stream: FakeStream) -> None:
        self.calls.append(("keep", stream.name))

    def zero(self, device: torch.device) -> torch.Tensor:
        return torch.zeros((), dtype=torch.bool)

    def tell_host(self, word: torch.Tensor, value: torch.Tensor) -> None:
        self._told.append((word, value))
        if not self.stands_still:
            self.go_on()

    def go_on(self) -> None:
        """The GPU tells this process's host what it has to tell."""
        self.stands_still = False
        while self._told:
            word, value = self._told.pop(0)
            word.copy_(value)

    def pause(self) -> None:
        raise AssertionError("a host waits for its GPU")


def _map(path: bytes) -> mmap.mmap:
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        raise RuntimeError(f"CUDA error: {error}") from None
    try:
        return mmap.mmap(fd, 0)
    finally:
        os.close(fd)


def _tensor(memory: mmap.mmap) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(np.frombuffer(memory, np.uint8))
