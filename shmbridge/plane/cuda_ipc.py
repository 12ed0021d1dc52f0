"""CUDA IPC as torch has it: the only module that calls torch's private functions.

Everything is exported once, at the startup barrier, and opened once. Tests replace this module with a stand-in. Docstrings name
the trap that a function avoids.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec
import torch

from shmbridge.shm import layout

_SIDE_STREAMS = 32  # of a device; torch hands them out in turn
_EXPANDABLE = b"e"
_HEADERLESS = 64  # bytes of an older torch's handle, which is CUDA's alone

Event = torch.cuda.Event
Stream = torch.cuda.Stream

_streams: weakref.WeakSet[Stream] = weakref.WeakSet()  # that `side_stream` gave and somebody holds


class MemoryHandle(msgspec.Struct, frozen=True):
    """One export of one allocation, for one importer: what torch's `_share_cuda_` gives, in its order, without the exporter's
    device. `_new_shared_cuda` takes it in the same order."""

    handle: bytes
    nbytes: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    wait: bool


def unusable(device: torch.device) -> str | None:
    """Why this process cannot export memory of `device`, or None where it can.

    cudaMallocAsync has no handles. Expandable segments turn handles into file descriptors that the other side takes with
    pidfd_getfd, which most containers refuse; the first two bytes of a handle show them.
    """
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        return (
            f"the allocator of the teacher's process is {backend}, whose memory cannot be exported; take `backend:` out of "
            "PYTORCH_CUDA_ALLOC_CONF there"
        )
    # Not in a pool: some versions of torch never use expandable segments there, and others raise an error.
    memory = torch.zeros(layout.OWN_BLOCK, dtype=torch.uint8, device=device)
    handle = export_memory(memory).handle
    # Since torch 2.5 a handle is a version byte, a letter for the kind of allocation, and what CUDA gave.
    if len(handle) != _HEADERLESS and handle[1:2] == _EXPANDABLE:
        return (
            "the teacher's process allocates expandable segments, whose handles do not open in other processes; take "
            "expandable_segments:True out of its PYTORCH_CUDA_ALLOC_CONF (training may keep it)"
        )
    return None


def identify(device: torch.device) -> str:
    """The GPU's UUID. Its number means different cards in processes that see different devices."""
    return str(torch.cuda.get_device_properties(device).uuid)


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 memory of at least `nbytes` with a cudaMalloc of its own, in a pool of its own that is kept for life.

    A handle opens the whole allocation that it lies in. Under 20 MiB, or cut from a free block of the cache, that would be one
    which torch shares out among other tensors of the exporter. torch.cuda.empty_cache() would have the same effect, but it waits
    for every stream, also for one that waits for a process that is gone. Never an inference tensor.
    """
    with torch.cuda.device(device):  # a pool belongs to the current one
        pool = torch.cuda.MemPool()
    # A pool that is destroyed waits for the device, also at the end of the interpreter. A count that nobody takes back keeps it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
    with torch.inference_mode(False), torch.cuda.use_mem_pool(pool, device):
        return torch.zeros(layout.block_bytes(nbytes), dtype=torch.uint8, device=device)


def export_memory(memory: torch.Tensor) -> MemoryHandle:
    """An export for one importer.

    Two importers of one export would both count its reference counter down. Exports are made once for the life of the
    memory: torch never uses a counter's place again, and each import keeps an event.
    """
    _, *fields = memory.untyped_storage()._share_cuda_()
    return MemoryHandle(*fields)


def open_memory(handle: MemoryHandle, device: torch.device) -> torch.Tensor:
    """The exporter's memory, uint8, as a tensor of this process's own `device`. Keep it: closing waits for the device.

    torch opens the memory in the context of the device that it is given. The exporter's number would make a context on the
    exporter's card, about 500 MB for each importer.
    """
    with torch.inference_mode(False), torch.cuda.device(device):
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *msgspec.structs.astuple(handle))
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def shared_event(device: torch.device) -> Event:
    """An event that other processes can wait for.

    It belongs to the device that is current when its handle is made, so that is done here, at once.
    """
    with torch.cuda.device(device):
        event = torch.cuda.Event(interprocess=True)
        event.ipc_handle()
    return event


def export_event(event: Event) -> bytes:
    """The handle of a shared event."""
    return bytes(event.ipc_handle())


def open_event(handle: bytes, device: torch.device) -> Event:
    """Another process's event. Waiting for one that was never recorded is no wait at all: record, then publish."""
    opened: Event = torch.cuda.Event.from_ipc_handle(device, handle)
    return opened


def timed_event() -> Event:
    """An event of this process's own that tells its time."""
    return torch.cuda.Event(enable_timing=True)


def current_stream(device: torch.device) -> Stream:
    return torch.cuda.current_stream(device)


def side_stream(device: torch.device) -> Stream:
    """An idle stream that no other caller in this process holds, while torch has one left. A stream that is not held any more may
    still wait for a process that is gone."""
    for _ in range(_SIDE_STREAMS):
        stream = torch.cuda.Stream(device)
        if stream not in _streams and stream.query():
            break
    _streams.add(stream)
    return stream


@contextmanager
def on(stream: Stream) -> Iterator[Stream]:
    """What is launched in the block goes to `stream`. Yields the stream of its device that was current before."""
    before = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        yield before


def keep_until(tensors: Iterable[torch.Tensor], stream: Stream) -> None:
    """The allocator does not reuse the memory of `tensors` before `stream` has finished what it holds now."""
    for tensor in tensors:
        tensor.record_stream(stream)


def pinned(count: int, device: torch.device) -> torch.Tensor:
    """(count,) bool in host memory that `device` writes to without this process waiting."""
    with torch.cuda.device(device):  # else CUDA would make a context on the current one
        return torch.zeros(count, dtype=torch.bool, pin_memory=True)


def zero(device: torch.device) -> torch.Tensor:
    """() bool in the memory of `device`: False."""
    return torch.zeros((), dtype=torch.bool, device=device)


def tell_host(word: torch.Tensor, value: torch.Tensor) -> None:
    """Have the current stream write `value` (() bool, on a GPU) into `word` (() bool, in pinned memory)."""
    word.copy_(value, non_blocking=True)


def pause() -> None:
    """Sleep for a millisecond, on a host that waits for its GPU. A wait inside CUDA would delay signals."""
    time.sleep(0.001)


def pid_namespace() -> int:
    """CUDA IPC works among processes of one PID namespace."""
    return os.stat("/proc/self/ns/pid").st_ino
