"""Where every process of the benchmarks is started, watched and ended.

Children are forked with everything loaded, use one thread, and collect no garbage while they measure. Nothing outlives the
bench: a child gets SIGKILL when the bench dies.
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
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_GRACE_S = 3.0


class Failed(Exception):
    """A process raised, died, or took longer than the bench's patience."""


class Processes:
    """Forked children that answer over pipes."""

    def __init__(self, scratch: Path, patience_s: float) -> None:
        """`scratch` is an empty directory: their log and their temporary files."""
        self._scratch = scratch
        self._log = scratch / "log"
        self._patience_s = patience_s
        self._all: list[Any] = []
        self._pipes: list[tuple[Any, Connection]] = []

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
        self._pipes.append((process, ours))
        return process

    def send(self, order: Any) -> None:
        """To every child with a pipe."""
        for _, pipe in self._pipes:
            pipe.send(order)

    def collect(self) -> list[Any]:
        """One message of each child with a pipe. Raises Failed."""
        deadline = time.monotonic() + self._patience_s
        return [self._receive(process, pipe, deadline) for process, pipe in self._pipes]

    def until(self, condition: Callable[[], Any]) -> Any:
        """Look every few milliseconds until `condition` gives something true, and give that. Raises Failed."""
        deadline = time.monotonic() + self._patience_s
        while not (value := condition()):
            self._check(deadline)
            time.sleep(0.005)
        return value

    def stop(self) -> None:
        """Let the children leave, and end those that do not."""
        for _, pipe in self._pipes:
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
        for _, pipe in self._pipes:
            pipe.close()

    def _receive(self, process: Any, pipe: Connection, deadline: float) -> Any:
        while True:
            alive = [each.sentinel for each in self._all if each.exitcode is None]
            ready = wait([pipe, *alive], max(0.0, deadline - time.monotonic()))
            if pipe in ready:
                try:
                    return pipe.recv()
                except EOFError:
                    process.join(_GRACE_S)
            self._check(deadline, process)

    def _check(self, deadline: float, wanted: Any = None) -> None:
        """Raise Failed where a child has failed, `wanted` has left, or time is up."""
        if any(each.exitcode for each in self._all) or (wanted is not None and wanted.exitcode is not None):
            raise Failed(f"ended early: {self._last_words()}")
        if time.monotonic() >= deadline:
            raise Failed(f"no answer within {self._patience_s:g} s")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "without a word")

    def _child(self, bench: int, core: int | None, body: Callable[[], None]) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != bench:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tempfile.tempdir = str(self._scratch)
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
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
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not cut the clean-up short."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def precise_sleeps() -> None:
    """Of this process: they end when they should, not up to 50 us later to save wake-ups."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


def cpu_ns(processes: Iterable[Any]) -> int:
    """CPU time of other processes, all their threads; of those that have ended none."""
    return sum(_cpu_ns(process.pid) for process in processes)


def _cpu_ns(pid: int) -> int:
    """By the clock that clock_getcpuclockid(3) names."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return 0
