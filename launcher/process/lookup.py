"""Other processes of this machine: which of them are ranks, their state, and signals that cannot reach a later
process of the same pid."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

from shmbridge.shm import process
from shmbridge.shm.process import Identity

GONE = ("gone", "zombie")  # states of a process that has ended


def ranks_among(pids: Iterable[int], having: str = "") -> dict[int, Identity]:
    """Those of `pids` that torchrun has started, by their LOCAL_RANK; `having`: an assignment that must stand in their
    environment too. A rank's workers inherit its environment: the rank is who started first."""
    found: dict[int, Identity] = {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        rank = next((entry[11:] for entry in environment if entry.startswith(b"LOCAL_RANK=")), b"")
        who = process.identity(pid) if rank.isdigit() and (not having or having.encode() in environment) else None
        if who:
            found[int(rank)] = min(found.get(int(rank), who), who, key=lambda other: (other.start, other.pid))
    return found


def state(who: Identity) -> str:
    """As process.state; gone where the pid is another process by now."""
    return process.state(who.pid) if process.identity(who.pid) == who else "gone"


def pidfd(who: Identity) -> int | None:
    """None where it has ended, and also where its pid is another process by now."""
    try:
        fd = os.pidfd_open(who.pid)
    except ProcessLookupError:
        return None
    if process.identity(who.pid) == who:
        return fd
    os.close(fd)
    return None


def send(who: Identity, number: int) -> bool:
    """False where the process has ended."""
    fd = pidfd(who)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True
