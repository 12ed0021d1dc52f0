"""Other processes: who is alive, signals that never reach a later process of the same pid, and Python stacks on demand.

A process is its pid and its start time, because pids are used again.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import weakref
from pathlib import Path
from typing import NamedTuple

STACKS_SIGNAL = signal.SIGRTMIN + 5  # one that neither hosts nor Slurm use
_writes_stacks_to: set[Path] = (
    set()
)  # files that this process, or the one that it was forked from, has open for its stacks


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


def state_of(who: Identity) -> str:
    """As `state`; gone where the pid is another process by now."""
    return state(who.pid) if identity(who.pid) == who else "gone"


def open_pidfd(who: Identity) -> int | None:
    """A file descriptor that is readable once the process has ended; None where it has ended already.

    Raises:
        OSError: the kernel, or a container's seccomp profile, has no pidfd_open.
    """
    try:
        fd = os.pidfd_open(who.pid)
    except (ProcessLookupError, OverflowError):  # gone, or a garbled number that no pid can be
        return None
    if identity(who.pid) == who:
        return fd
    os.close(fd)
    return None


def send(who: Identity, number: int) -> bool:
    """Send a signal. False where the process has ended."""
    fd = open_pidfd(who)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


class Peer:
    """Another process, watched through a pidfd; through /proc where a container forbids pidfd_open."""

    def __init__(self, who: Identity) -> None:
        self.identity = who
        self.fd: int | None = None  # readable once it has ended; closed with this object
        self._poll: select.poll | None = None
        try:
            self.fd = open_pidfd(who)
            self._dead = self.fd is None
        except OSError:
            self._dead = False
        if self.fd is not None:
            weakref.finalize(self, os.close, self.fd)
            self._poll = select.poll()
            self._poll.register(self.fd, select.POLLIN)

    def alive(self) -> bool:
        """False once the process has ended, whether or not its parent has reaped it."""
        if not self._dead:
            if self._poll:
                self._dead = bool(self._poll.poll(0))
            else:
                self._dead = state_of(self.identity) in ("zombie", "gone")
        return not self._dead


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/pid/stat from the state on; the command name before it may hold any character."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(b")") + 2 :].decode().split()


def stacks_path(run: Path, pid: int) -> Path:
    """Where the process with `pid` of a run in directory `run` writes its stacks."""
    return run / "stacks" / f"{pid}.txt"


def write_stacks_on_signal(run: Path) -> bool:
    """Let faulthandler write this process's Python stacks to `stacks_path` when STACKS_SIGNAL arrives. False where the signal is
    taken, or there is no such run directory.

    It works while the interpreter is stuck in native code, holds the GIL or waits in a collective; not while the process is
    stopped. A forked child, such as a DataLoader worker, has the handler too, and would write into its parent's file: the reader
    asks by pid. Calling it again opens nothing more.
    """
    file = stacks_path(run, os.getpid())
    if file in _writes_stacks_to:
        return True
    if signal.getsignal(STACKS_SIGNAL) is not signal.SIG_DFL or not run.is_dir():
        return False
    file.parent.mkdir(exist_ok=True)
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True, chain=False)
    _writes_stacks_to.add(file)
    return True
