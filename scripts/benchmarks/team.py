"""The processes of one contestant in one cell: forked, pinned, watched, ended.

The ranks stay connected for the whole cell and sleep on a pipe between their turns, so that contestants can take turns
without starting again. Nothing outlives the bench: a child gets SIGKILL when the bench dies.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp

from benchmarks.cell import Cell, Model
from benchmarks.contestant import Contestant

_PR_SET_PDEATHSIG = 1
_GRACE_S = 3.0


class Failed(Exception):
    """The contestant raised, died, or took longer than the bench's patience."""


class Turn(NamedTuple):
    """What one turn of `requests` per rank took. `teacher_ns` counts the warm-up of the turn as well."""

    samples_ns: list[int]
    rank_cpu_ns: int
    teacher_cpu_ns: int
    teacher_requests: int


class Team:
    """A teacher and its ranks."""

    def __init__(self, contestant: Contestant, cell: Cell, scratch: Path, patience_s: float) -> None:
        self.contestant = contestant
        self.model = Model(cell.reply_bytes)
        self._cell = cell
        self._patience_s = patience_s
        self._log = scratch / "log"
        self._teacher: Any = None
        self._ranks: list[Any] = []
        self._pipes: list[Connection] = []
        self._scratch = scratch

    def start(self) -> None:
        """Fork, connect, and see the right reply arrive at every rank. Raises Failed; `stop` is due in any case."""
        try:
            self.contestant.prepare(self._cell, self.model, self._scratch)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        self._teacher = self._fork(self._cell.teacher_core, self.contestant.teach)
        for index, core in enumerate(self._cell.rank_cores):
            ours, theirs = mp.Pipe()
            self._pipes.append(ours)
            self._ranks.append(self._fork(core, partial(self._obey, index, theirs)))
            theirs.close()
        self._collect()

    def turn(self, warm: int, requests: int) -> Turn:
        """Every rank makes `warm` requests unmeasured and `requests` measured ones, all ranks at once. Raises Failed."""
        before = self.teacher_cpu_ns()
        self.begin(warm, requests)
        answers = self._collect()
        samples = [sample for samples, _ in answers for sample in samples]
        asked = (warm + requests) * len(answers)
        return Turn(samples, sum(cpu for _, cpu in answers), self.teacher_cpu_ns() - before, asked)

    def begin(self, warm: int, requests: int) -> None:
        """Send the ranks off; `finish` waits for them."""
        for pipe in self._pipes:
            pipe.send((warm, requests))

    def finish(self) -> None:
        """Wait for what `begin` began. Raises Failed."""
        self._collect()

    def teacher_cpu_ns(self) -> int:
        return _cpu_ns(self._teacher.pid)

    def rank_cpu_ns(self) -> int:
        """Of all ranks together."""
        return sum(_cpu_ns(rank.pid) for rank in self._ranks)

    def stop(self) -> None:
        """Let the processes leave, end those that do not, and remove what the contestant made."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        deadline = time.monotonic() + _GRACE_S
        for process in filter(None, [*self._ranks, self._teacher]):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self.contestant.close()

    # In the bench's process

    def _fork(self, core: int, body: Callable[[], None]) -> Any:
        process = mp.get_context("fork").Process(target=self._child, args=(os.getpid(), core, body), daemon=True)
        process.start()
        return process

    def _collect(self) -> list[Any]:
        """One message of each rank."""
        deadline = time.monotonic() + self._patience_s
        return [self._receive(rank, pipe, deadline) for rank, pipe in zip(self._ranks, self._pipes, strict=True)]

    def _receive(self, rank: Any, pipe: Connection, deadline: float) -> Any:
        while True:
            processes = [process for process in (rank, self._teacher) if process.exitcode is None]
            sentinels = [process.sentinel for process in processes]
            ready = wait([pipe, *sentinels], max(0.0, deadline - time.monotonic()))
            if pipe in ready:
                try:
                    return pipe.recv()
                except EOFError:
                    rank.join(_GRACE_S)
            if rank.exitcode is not None or self._teacher.exitcode:
                raise Failed(f"ended early: {self._last_words()}")
            if not ready:
                raise Failed(f"no answer within {self._patience_s:g} s")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "without a word")

    # In the children

    def _child(self, bench: int, core: int, body: Callable[[], None]) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != bench:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tempfile.tempdir = str(self._scratch)
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        gc.disable()
        try:
            body()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)

    def _obey(self, index: int, pipe: Connection) -> None:
        with self.contestant.rank(index) as ask:
            ask(self.model.check)
            pipe.send(None)
            while True:
                order = pipe.recv()
                if order is None:
                    break
                warm, requests = order
                for _ in range(warm):
                    ask(None)
                pipe.send(_measure(ask, requests))


def _measure(ask: Callable[[None], None], requests: int) -> tuple[list[int], int]:
    """Nanoseconds of each request, and CPU nanoseconds of all together (every thread of this process)."""
    clock = time.perf_counter_ns
    samples = [0] * requests
    cpu = time.process_time_ns()
    for i in range(requests):
        started = clock()
        ask(None)
        samples[i] = clock() - started
    return samples, time.process_time_ns() - cpu


def _cpu_ns(pid: int) -> int:
    """CPU time of another process, all its threads: the clock that clock_getcpuclockid(3) names. 0 once it ended."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return 0
