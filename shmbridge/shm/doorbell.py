"""Doorbells, and the one blocking wait of the project.

A doorbell is a POSIX semaphore that says "look". It carries no data and may ring too often: whoever is woken reads the
shared memory again. So a lost, doubled or stray ring costs time and changes nothing else.

Prior art: a futex with a condition in shared memory, and the doorbells of RDMA queues.

posix_ipc creates and rings the semaphore; the sleep itself is libc's sem_clockwait. posix_ipc's own acquire would sleep on
the realtime clock, which an administrator may set, and it swallows what a signal handler raises: a rank whose SIGTERM
handler calls sys.exit() would sleep on.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

import posix_ipc

from shmbridge.errors import PeerLost
from shmbridge.shm.segment import explained

SLICE_S = 0.2

T = TypeVar("T")


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_libc = ctypes.CDLL(None)
_libc.sem_open.restype = ctypes.c_void_p
_sem_clockwait = getattr(_libc, "sem_clockwait", None)  # glibc 2.30
_MONOTONIC = ctypes.c_int(time.CLOCK_MONOTONIC)


class Doorbell:
    """A named semaphore. Any thread rings it; one thread of a process waits on it.

    It is closed with the last reference to it, as a segment is unmapped.
    """

    def __init__(self, name: str, *, create: bool = False) -> None:
        """Open the semaphore, or make it. Raises AttachError where it is not there, PlanError where there is no room for it."""
        self.name = name
        flags = posix_ipc.O_CREX if create else 0
        with explained(f"doorbell {name}"):
            self._semaphore = posix_ipc.Semaphore(name, flags, mode=0o600, initial_value=0)
            handle = _libc.sem_open(name.encode(), 0)
            if not handle:
                raise posix_ipc.ExistentialError
        self._handle = ctypes.c_void_p(handle)
        closing = weakref.finalize(self, _close, self._semaphore, self._handle)
        closing.atexit = False  # a thread may still ring then
        self._until = _Timespec()
        self._until_reference = ctypes.byref(self._until)

    def ring(self) -> None:
        self._semaphore.release()

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

        At the deadline `check` has the last word: what died is named rather than timed. What became ready before a peer
        was lost is still given.
        """
        value = ready()
        if value is None and spin_s:
            stop = time.perf_counter() + spin_s
            while value is None and time.perf_counter() < stop:
                value = ready()
        if value is not None:
            self.drain()
            return value
        next_check = time.monotonic() + SLICE_S
        while True:
            until = next_check if deadline is None else min(next_check, deadline)
            self._sleep(until)
            value = ready()
            if value is not None:
                return value
            now = time.monotonic()
            if now < until:
                continue
            try:
                check()
            except PeerLost:
                value = ready()
                if value is None:
                    raise
                return value
            value = ready()
            if value is not None or (deadline is not None and now >= deadline):
                return value
            next_check = now + SLICE_S

    def drain(self) -> None:
        """Take back the rings that nobody slept for, so that they do not pile up. The next wait reads the state first."""
        try:
            while True:
                self._semaphore.acquire(0)
        except posix_ipc.BusyError:
            pass

    def _sleep(self, until: float) -> None:
        """Sleep until rung, until time.monotonic() is `until`, or until a signal. What its handler raises is raised.

        The result is not looked at: whatever woke us, the caller reads the state and the clock.
        """
        if (
            _sem_clockwait is None
        ):  # an older libc has the realtime clock alone; the slices bound what a step of it does
            until += time.time() - time.monotonic()
        self._until.seconds, self._until.nanoseconds = int(until), int(until % 1 * 1e9)
        if _sem_clockwait is None:
            _libc.sem_timedwait(self._handle, self._until_reference)
        else:
            _sem_clockwait(self._handle, _MONOTONIC, self._until_reference)


def _close(semaphore: posix_ipc.Semaphore, handle: ctypes.c_void_p) -> None:
    _libc.sem_close(handle)
    semaphore.close()
