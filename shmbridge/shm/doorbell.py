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
from collections.abc import Callable
from typing import TypeVar

import posix_ipc

from shmbridge.errors import AttachError, PeerLost
from shmbridge.shm.segment import raise_if_no_room

SLICE_S = 0.2
_NBYTES = 32  # of a semaphore in /dev/shm

T = TypeVar("T")


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_libc = ctypes.CDLL(None)
_libc.sem_open.restype = ctypes.c_void_p
_sem_clockwait = getattr(_libc, "sem_clockwait", None)  # glibc 2.30
_MONOTONIC = ctypes.c_int(time.CLOCK_MONOTONIC)


class Doorbell:
    """A named semaphore. `ring` is sem_post. One thread of a process waits on it."""

    def __init__(self, name: str, *, create: bool = False) -> None:
        """Open the semaphore, or make it. Raises AttachError where it is not there, PlanError where there is no room for it."""
        self.name = name
        try:
            flags = posix_ipc.O_CREX if create else 0
            self._semaphore = posix_ipc.Semaphore(name, flags, mode=0o600, initial_value=0)
        except posix_ipc.ExistentialError:
            raise AttachError(f"doorbell {name} does not exist: the session has ended. Start a new one.") from None
        except (posix_ipc.PermissionsError, PermissionError):
            raise AttachError(f"doorbell {name} belongs to another user; a session is private to its user.") from None
        except OSError as error:
            raise_if_no_room(error, f"doorbell {name}", _NBYTES)
            raise
        self.ring = self._semaphore.release
        handle = _libc.sem_open(name.encode(), 0)
        if not handle:
            raise AttachError(f"doorbell {name} does not exist: the session has ended. Start a new one.")
        self._handle = ctypes.c_void_p(handle)
        self._until = _Timespec()
        self._until_reference = ctypes.byref(self._until)

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
        now = time.monotonic()
        next_check = now + SLICE_S
        while deadline is None or now < deadline:
            self._sleep(next_check if deadline is None else min(next_check, deadline))
            value = ready()
            if value is not None:
                return value
            now = time.monotonic()
            if now >= next_check:
                value = self._checked(ready, check)
                if value is not None:
                    return value
                next_check = now + SLICE_S
        return self._checked(ready, check)

    @staticmethod
    def _checked(ready: Callable[[], T | None], check: Callable[[], None]) -> T | None:
        try:
            check()
        except PeerLost:
            value = ready()
            if value is None:
                raise
            return value
        return ready()

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
        ):  # an older libc knows the realtime clock alone; the slices bound what a step of it does
            until += time.time() - time.monotonic()
        seconds = int(until)
        self._until.seconds, self._until.nanoseconds = seconds, int((until - seconds) * 1e9)
        if _sem_clockwait is None:
            _libc.sem_timedwait(self._handle, self._until_reference)
        else:
            _sem_clockwait(self._handle, _MONOTONIC, self._until_reference)

    def close(self) -> None:
        _libc.sem_close(self._handle)
        self._semaphore.close()
