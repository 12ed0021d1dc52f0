"""The small parent of each job, which lets nothing outlive it.

    launcher ── shim ── teacher
            └── shim ── torchrun ── ranks ── DataLoader workers

Ranks are sessions of their own, so killing torchrun's process group misses them, and `kill -9` of torchrun or of the
launcher would leave them behind. The shim is a child subreaper: whatever loses its parent below it becomes its child. It
is told by the kernel when the launcher dies, and its own direct child is killed by the kernel when the shim dies.

    STOP_SIGNALS and HOLD_SIGNAL   go on to the direct child alone
    KILL_SIGNAL                    SIGKILL for everything below
    the launcher dies              the same
    the direct child ends          SIGKILL for everything that is left, then the same exit code, or death by the same signal
    other signals                  ignored; those of a user or a scheduler also in the direct child, until it handles them

Slurm sends a signal to every process of a step at once. The launcher is among them and decides what follows, so its own
requests to a job are signals that nobody else sends.

multiprocessing's resource trackers are killed a second later than the rest: one unlinks the semaphores of its dead parent
from /dev/shm, and then ends by itself.

Run by path, `python -I -S shim.py LAUNCHER_PID COMMAND...`, with the standard library alone: it is up in 30 ms.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from typing import NoReturn

KILL_SIGNAL = signal.SIGRTMIN + 7
# Stop the training group with SIGINT or with SIGTERM; elastic.py has the same numbers.
STOP_SIGNALS = {signal.SIGINT: signal.SIGRTMIN + 8, signal.SIGTERM: signal.SIGRTMIN + 9}
# The run is about to stop: a rank that ends is no reason to end the others.
HOLD_SIGNAL = signal.SIGRTMIN + 10

_IGNORED_BY_CHILD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TRACKERS_S = 1.0  # what resource trackers take to unlink names: milliseconds
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CANNOT_EXECUTE = 127


def main(launcher: int, command: list[str]) -> NoReturn:
    """Start `command`, stay until nothing of it is left, and end as it did."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    become_subreaper()
    _die_with_parent(KILL_SIGNAL, launcher)
    shim = os.getpid()
    child = os.fork()
    if child == 0:
        _execute(command, shim)
    status = _guard(child)
    _clear()
    _end_like(status)


def become_subreaper() -> None:
    """Make this process the parent of whatever is orphaned below it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int) -> list[int]:
    """Pids of the live processes below `root`, parents first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            parent = _parent(int(name))
            if parent:
                children.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found[1:]


def kill_all(pids: list[int], and_trackers: bool) -> None:
    """SIGKILL for each of `pids`; for multiprocessing's resource trackers only with `and_trackers`."""
    for pid in pids:
        if and_trackers or not _is_tracker(pid):
            _send(pid, signal.SIGKILL)


def _send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _guard(child: int) -> int:
    """Serve signals until `child` has ended; its wait status. Orphans are reaped on the way."""
    while True:
        number = signal.sigwait(signal.valid_signals())
        if number in (*STOP_SIGNALS.values(), HOLD_SIGNAL):
            _send(child, number)
        elif number == KILL_SIGNAL:
            kill_all(descendants(os.getpid()), and_trackers=False)
        elif number == signal.SIGCHLD:
            pid, status = os.waitpid(-1, os.WNOHANG)
            while pid not in (0, child):  # `child` is not reaped yet, so that there is always one to wait for
                pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                return status


def _clear() -> None:
    """Kill and reap until nothing is left: what a dying process forked meanwhile arrives here as an orphan."""
    trackers_until = time.monotonic() + _TRACKERS_S
    while True:
        left_s = trackers_until - time.monotonic()
        kill_all(descendants(os.getpid()), and_trackers=left_s <= 0)
        try:
            reaped, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not reaped:
            signal.sigtimedwait((signal.SIGCHLD,), left_s if left_s > 0 else _TRACKERS_S)


def _end_like(status: int) -> NoReturn:
    """End with the exit code, or by the signal, that `status` tells; without a core file of the shim's own."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _execute(command: list[str], shim: int) -> NoReturn:
    """In the forked child: become `command`, in a session of its own, which dies with the shim."""
    os.setsid()
    _die_with_parent(signal.SIGKILL, shim)
    for number in _IGNORED_BY_CHILD:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot execute {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(_CANNOT_EXECUTE)


def _die_with_parent(number: int, parent: int) -> None:
    """Have the kernel send `number` when the parent dies; end at once if it is dead already."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {value}): {os.strerror(error)}")


def _parent(pid: int) -> int:
    """The parent of a live process; 0 for one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, parent = text[text.rindex(b")") + 2 :].split()[:2]
    return 0 if state in (b"Z", b"X") else int(parent)


def _is_tracker(pid: int) -> bool:
    """Whether a process is a resource tracker of multiprocessing, or of joblib's copy of it."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker import main" in file.read()
    except OSError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
