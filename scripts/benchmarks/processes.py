"""Forked processes of a benchmark: how they are started, asked and ended.

Children are forked with everything loaded, use one thread, and collect no garbage while they measure. Nothing outlives the
benchmark: a child gets SIGKILL when the benchmark's process dies.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_GRACE_S = 3.0
_LOOK_S = 0.1  # how often a wait looks whether all processes are alive


class Failed(Exception):
    """A process raised, died, or took longer than --patience."""


class Processes:
    """Forked children that answer over pipes. `directory` is theirs, and empty at first."""

    def __init__(self, patience_s: float) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="shmbridge-bench-")
        self.directory = Path(self._temporary.name)
        self._log = self.directory / "log"
        self._patience_s = patience_s
        self._all: list[Any] = []
        self._pipes: list[Connection] = []

    def fork(self, body: Callable[[], None], core: int | None = None) -> Any:
        """A child that runs `body`, on `core` alone where it is given; a multiprocessing.Process."""
        process = mp.get_context("fork").Process(target=self._child, args=(os.getpid(), core, body), daemon=True)
        process.start()
        self._all.append(process)
        return process

    def fork_with_pipe(self, body: Callable[[Connection], None], core: int | None = None) -> Any:
        """A child that takes orders from a pipe and answers each with one message. The order None ends it."""
        ours, theirs = mp.Pipe()
        process = self.fork(lambda: body(theirs), core)
        theirs.close()
        self._pipes.append(ours)
        return process

    def send(self, order: Any) -> None:
        """To every child with a pipe."""
        for pipe in self._pipes:
            pipe.send(order)

    def collect(self) -> list[Any]:
        """One message of each child with a pipe. Raises Failed."""
        deadline = time.monotonic() + self._patience_s
        return [self._receive(pipe, deadline) for pipe in self._pipes]

    def _receive(self, pipe: Connection, deadline: float) -> Any:
        while not pipe.poll(_LOOK_S):
            self._check(deadline)
        try:
            return pipe.recv()
        except EOFError:
            raise Failed(f"ended early: {self._last_words()}") from None

    def until(self, condition: Callable[[], Any]) -> Any:
        """Look every few milliseconds until `condition` returns something true, and return that. Raises Failed."""
        deadline = time.monotonic() + self._patience_s
        while not (value := condition()):
            self._check(deadline)
            time.sleep(0.005)
        return value

    def _check(self, deadline: float) -> None:
        if any(process.exitcode for process in self._all):
            raise Failed(f"ended early: {self._last_words()}")
        if time.monotonic() >= deadline:
            raise Failed(f"no answer within {self._patience_s:g} s")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "without a word")

    def stop(self) -> None:
        """Let the children leave, end those that do not, and remove their directory."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        deadline = time.monotonic() + _GRACE_S
        for process in reversed(self._all):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._temporary.cleanup()

    def _child(self, parent: int, core: int | None, body: Callable[[], None]) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tempfile.tempdir = str(self.directory)
        os.dup2(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        if core is not None:
            os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        gc.disable()
        try:
            body()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)


@contextmanager
def undoing() -> Iterator[ExitStack]:
    """An exit stack whose callbacks a second Ctrl-C does not interrupt."""
    with ExitStack() as undo:
        try:
            yield undo
        finally:
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            undo.close()
            signal.signal(signal.SIGINT, previous)


def precise_sleeps() -> None:
    """This process's sleeps end when they should, not up to 50 us later to save wake-ups."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


def sleep_until(deadline: float) -> None:
    """Sleep until time.monotonic() is `deadline`."""
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)


def cpu_ns(processes: Iterable[Any]) -> int:
    """CPU time of other processes, all their threads; of those that have ended none."""
    total = 0
    for process in processes:
        try:
            total += time.clock_gettime_ns((~process.pid << 3) | 2)  # the clock that clock_getcpuclockid(3) names
        except OSError:
            pass
    return total
