"""The raw limit: one file and two semaphores for each rank, and no protocol.

The rank copies its IDs in, posts, waits, and copies the reply out; the teacher waits, copies the IDs out and the reply in,
and posts. Nothing is checked, nobody is watched, a death is a hang. Several ranks are served round-robin.
"""

from __future__ import annotations

import mmap
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import posix_ipc

from benchmarks.cell import TOKENS, Ask, Cell, Check, Model, token_ids

_IDS = TOKENS * 8


class _Lane:
    """One rank's file and semaphores. The names are gone as soon as they are open: forked processes inherit them."""

    def __init__(self, reply_bytes: int) -> None:
        name = f"/bench-raw-{secrets.token_hex(8)}"
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=_IDS + reply_bytes)
        memory.unlink()
        view = memoryview(mmap.mmap(memory.fd, _IDS + reply_bytes))
        memory.close_fd()
        self.ids, self.reply = view[:_IDS], view[_IDS:]
        self.request, self.answer = _semaphore(name + "-request"), _semaphore(name + "-answer")


def _semaphore(name: str) -> posix_ipc.Semaphore:
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
    semaphore.unlink()
    return semaphore


class Raw:
    """See the module."""

    name = "raw limit"
    ranked = False

    def prepare(self, cell: Cell, model: Model, scratch: Path) -> None:
        self._model = model
        self._lanes = [_Lane(cell.reply_bytes) for _ in range(cell.ranks)]
        self._left = memoryview(mmap.mmap(-1, mmap.PAGESIZE))

    def teach(self) -> None:
        answer = self._model.answers().numpy().data.cast("B")
        ids = memoryview(bytearray(_IDS))
        forward, left, lanes = self._model.forward, self._left, self._lanes
        while True:
            for lane in lanes:
                lane.request.acquire()
                if left[0]:
                    return
                ids[:] = lane.ids
                forward()
                lane.reply[:] = answer
                lane.answer.release()

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        lane = self._lanes[index]
        ids = token_ids().numpy().data.cast("B")
        reply = memoryview(bytearray(len(lane.reply)))

        def ask(check: Check) -> None:
            lane.ids[:] = ids
            lane.request.release()
            lane.answer.acquire()
            reply[:] = lane.reply
            if check:
                check(reply)

        yield ask
        self._left[0] = 1
        lane.request.release()

    def close(self) -> None:
        pass
