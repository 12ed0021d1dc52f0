"""Who is alive. A process is its pid and its start time, because pids are used again."""

from __future__ import annotations

import os
import select
import weakref
from typing import NamedTuple


class Identity(NamedTuple):
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start: int  # field 22 of /proc/pid/stat: clock ticks since boot


def identity(pid: int) -> Identity | None:
    """The process that has `pid` now, or None."""
    fields = _stat(pid)
    return Identity(pid, int(fields[19])) if fields else None


def myself() -> Identity:
    me = identity(os.getpid())
    assert me is not None, "this process has no /proc entry"
    return me


def state(pid: int) -> str:
    """One word for what the kernel says of `pid`: running, sleeping, stopped, zombie or gone."""
    fields = _stat(pid)
    letter = fields[0] if fields else "X"
    return {"R": "running", "T": "stopped", "t": "stopped", "Z": "zombie", "X": "gone"}.get(letter, "sleeping")


class Peer:
    """Another process, watched through a pidfd; through /proc where a container forbids pidfd_open."""

    def __init__(self, who: Identity) -> None:
        self.identity = who
        self._pidfd: int | None = None
        self._dead = False
        try:
            self._pidfd = os.pidfd_open(who.pid)
        except (ProcessLookupError, OverflowError):  # gone, or a garbled number that no pid can be
            self._dead = True
        except OSError:
            pass
        else:
            weakref.finalize(self, os.close, self._pidfd)
            self._poll = select.poll()
            self._poll.register(self._pidfd, select.POLLIN)
        if identity(who.pid) != who:  # the pid was already another process when the pidfd was opened
            self._dead = True

    def alive(self) -> bool:
        """False once the process has ended, whether or not its parent has reaped it."""
        if not self._dead:
            if self._pidfd is not None:
                self._dead = bool(self._poll.poll(0))
            else:
                self._dead = identity(self.identity.pid) != self.identity or state(self.identity.pid) == "zombie"
        return not self._dead


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/pid/stat from the state on; the command name before it may hold any character."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(b")") + 2 :].decode().split()
