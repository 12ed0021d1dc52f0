"""One job: a shim and everything below it. The one place where processes are started and stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from launcher.planning.jobs import JobSpec
from launcher.process import shim
from shmbridge.shm import process

_CLEAR_S = 5.0


class Exit(NamedTuple):
    """How a job ended."""

    code: int | None  # None where a signal ended it
    signal: int | None
    peak_rss: int  # bytes, of the job's largest process that was waited for
    at_ns: int  # CLOCK_MONOTONIC, when it was seen

    @property
    def failed(self) -> bool:
        return self.code != 0

    @property
    def status(self) -> int:
        """As a shell has it: the exit code, or 128 + the signal's number."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


class Job:
    """A running job. Start it from the main thread: the kernel ends the shim with the thread that started it."""

    def __init__(self, spec: JobSpec, base: Mapping[str, str]) -> None:
        """Start `spec` with the environment that it makes of `base`."""
        self.spec = spec
        self.name = spec.name
        self.exit: Exit | None = None
        self.first_pid = 0  # of the teacher or torchrun, below the shim; known at the first poll that finds it
        self.asked = False  # to end, by this launcher, while it still ran: its exit status is no failure then
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        self.pid = os.posix_spawn(
            sys.executable,
            shimmed(spec.argv),
            spec.environment(base),
            file_actions=[
                *(() if spec.reads_terminal and _has_terminal() else (no_input,)),
                (os.POSIX_SPAWN_OPEN, 1, str(spec.log), write, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,  # Ctrl-C on the terminal reaches the launcher alone
            setsigmask=[],
        )
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def alive(self) -> bool:
        return self.exit is None

    @property
    def died(self) -> bool:
        """It has ended with a failure, and not because this launcher asked it to end."""
        return self.exit is not None and self.exit.failed and not self.asked

    def poll(self) -> Exit | None:
        """The exit, once the job has ended and nothing of it is left."""
        if self.exit is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
                number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
                self.exit = Exit(code, number, usage.ru_maxrss * 1024, time.monotonic_ns())
                os.close(self.pidfd)
            elif not self.first_pid:
                self.first_pid = next(iter(self.children()), 0)
        return self.exit

    def hold(self) -> None:
        """Have torchrun wait for the other ranks when one ends, until `stop` or `kill`."""
        self._send(shim.HOLD_SIGNAL)

    def stop(self, number: signal.Signals) -> None:
        """Have torchrun send SIGINT or SIGTERM to each rank, once, and wait for them."""
        self._send(shim.STOP_SIGNALS[number])

    def kill(self) -> None:
        """SIGKILL for all of the job."""
        self._send(shim.KILL_SIGNAL)

    def _send(self, number: int) -> None:
        if self.exit is None:
            # Where the first process has ended, only the shim does not tell it yet.
            self.asked |= process.state(self.first_pid or self.pid) not in ("zombie", "gone")
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass  # it has ended; the next poll tells how

    def children(self) -> list[int]:
        """Pids of the job's processes: its first process, then what that has started."""
        return shim.descendants(self.pid) if self.alive else []


def sweep(jobs: Iterable[Job], and_trackers: bool = False) -> int:
    """Kill what the launcher has inherited from a shim that was killed; multiprocessing's resource trackers, which end by
    themselves, only with `and_trackers`. Returns how many processes there were."""
    below = shim.descendants(os.getpid())
    guarded = {pid for job in jobs if job.alive for pid in (job.pid, *job.children())}
    orphans = [pid for pid in below if pid not in guarded]
    shim.kill_all(orphans, and_trackers)
    return len(orphans)


def reap(jobs: Iterable[Job]) -> None:
    """Collect orphans that have ended; a job is collected by its own poll."""
    own = {job.pid for job in jobs}
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in own:
            return
        os.waitpid(ended.si_pid, 0)


def clear(jobs: Collection[Job]) -> str:
    """Kill and collect all of the jobs, and what they left behind. The pids that even so are still there; empty where there
    are none."""
    for job in jobs:
        job.kill()
    deadline = time.monotonic() + _CLEAR_S
    while time.monotonic() < deadline:
        ended = [job.poll() for job in jobs]
        if not sweep(jobs, and_trackers=time.monotonic() > deadline - _CLEAR_S / 2) and all(ended):
            return ""
        reap(jobs)
        time.sleep(0.01)
    return ", ".join(str(pid) for job in jobs for pid in job.children())


def shimmed(argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` below a shim of this process's."""
    return [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), *argv]


def _has_terminal() -> bool:
    """Whether stdin is a terminal, and this process in its foreground: one in the background would take what is typed for the
    shell."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
