"""Doorbells, and the one blocking wait of the project.

A doorbell is a POSIX semaphore that says "look". It carries no data and may ring too often: whoever is woken reads the
shared memory again. So a lost, doubled or stray ring costs time and changes nothing else.

Prior art: a futex with a condition in shared memory, and the doorbells of RDMA queues. posix_ipc.acquire waits on the
realtime clock, so a long wait would be stretched by a clock step; here every sleep is a short slice, and the deadline is
monotonic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import posix_ipc

from shmbridge.errors import AttachError

SLICE_S = 0.2

T = TypeVar("T")


class Doorbell:
    """A named semaphore. `ring` is sem_post."""

    def __init__(self, name: str, *, create: bool = False) -> None:
        self.name = name
        try:
            flags = posix_ipc.O_CREX if create else 0
            self._semaphore = posix_ipc.Semaphore(name, flags, mode=0o600, initial_value=0)
        except posix_ipc.ExistentialError:
            raise AttachError(f"doorbell {name} does not exist: the session has ended. Start a new one.") from None
        self.ring = self._semaphore.release

    def wait(
        self,
        ready: Callable[[], T | None],
        check: Callable[[], None],
        deadline: float | None,
        spin_s: float = 0.0,
    ) -> T | None:
        """Sleep until `ready()` gives something other than None, and give that; None once `deadline` has passed.

        Args:
            ready: reads shared memory. Called before the first sleep and after each wake-up.
            check: called once a slice (0.2 s) and at the deadline; raises when there is nobody left to wait for.
            deadline: time.monotonic() seconds, or None where nothing is owed and `check` bounds the wait.
            spin_s: call `ready` in a loop for this many seconds before the first sleep.

        At the deadline `check` has the last word: what died is named rather than timed.
        """
        value = ready()
        if value is None and spin_s:
            stop = time.perf_counter() + spin_s
            while value is None and time.perf_counter() < stop:
                value = ready()
        if value is not None:
            self._take()
            return value
        now = time.monotonic()
        next_check = now + SLICE_S
        while deadline is None or now < deadline:
            self._sleep(next_check - now if deadline is None else min(next_check, deadline) - now)
            value = ready()
            if value is not None:
                return value
            now = time.monotonic()
            if now >= next_check:
                check()
                next_check = now + SLICE_S
        check()
        return ready()

    def _take(self) -> None:
        """Take back one ring that was not needed, so that unneeded rings do not pile up."""
        try:
            self._semaphore.acquire(0)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            pass

    def _sleep(self, seconds: float) -> None:
        try:
            self._semaphore.acquire(seconds)
        except posix_ipc.BusyError:
            pass  # the slice is over
        except posix_ipc.SignalError:
            pass  # the handler has set its flag; the caller's check reads it

    def close(self) -> None:
        self._semaphore.close()
