"""Streams and pools as shmbridge.plane.cuda_ipc takes them from torch, over stand-ins for torch's own classes."""

from __future__ import annotations

import gc
import itertools
import types
import weakref
from contextlib import contextmanager

import pytest
import torch

from shmbridge.plane import cuda_ipc

CPU = torch.device("cpu")
MIB = 2**20


def test_a_side_stream_is_nobody_elses_and_idle_as_long_as_there_is_one_left(monkeypatch):
    """torch hands out 32 in turn, each time as another object. One that nobody holds may be stuck."""
    turn = itertools.count()
    stuck = {7}

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.number = next(turn) % 32

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and self.number == other.number

        def query(self) -> bool:
            return self.number not in stuck

        def __hash__(self) -> int:
            return self.number

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(cuda_ipc, "_streams", weakref.WeakSet())
    lane = cuda_ipc.side_stream(CPU)
    for _ in range(100):  # restarts
        found = cuda_ipc.side_stream(CPU)
        assert found != lane and found.query()
    stuck.clear()
    del found
    held = [lane] + [cuda_ipc.side_stream(CPU) for _ in range(31)]
    assert len(set(held)) == 32
    assert cuda_ipc.side_stream(CPU) in held


def test_a_slab_has_a_pool_of_its_own_that_not_even_the_end_of_the_interpreter_destroys(monkeypatch):
    """Giving the cache back waits for every stream, also for one that waits for a process that is gone; so does a pool that is
    destroyed. At its end Python destroys whatever a module, or anything else that it knows, refers to."""
    used, current = [], []

    @contextmanager
    def on(device: torch.device):
        current.append(device)
        yield
        current.pop()

    class Pool:  # torch's belongs to the current device
        def __init__(self) -> None:
            assert current == [CPU]

    @contextmanager
    def use(pool: Pool, device: torch.device):
        used.append(weakref.ref(pool))
        yield

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("it waits for every stream"))
    sizes = [cuda_ipc.allocate(nbytes, CPU).numel() for nbytes in (1, 50 * MIB + 1)]
    assert sizes == [20 * MIB, 52 * MIB]
    assert len({id(pool()) for pool in used}) == 2
    for pool in used:
        assert not [one for one in gc.get_referrers(pool()) if not isinstance(one, types.FrameType)]


def test_expandable_segments_are_looked_for_outside_of_a_pool(monkeypatch):
    """In a pool some versions of torch never use them, and others refuse to allocate."""
    handles = {"expandable": cuda_ipc.MemoryHandle(b"\x01e" + bytes(30), 1, 0, b"", 0, b"", False)}
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: pytest.fail("in a pool"))
    monkeypatch.setattr(cuda_ipc, "export_memory", lambda memory: handles["expandable"])
    assert "expandable segments" in str(cuda_ipc.unusable(CPU))
