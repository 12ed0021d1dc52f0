"""The processes of one contestant in one cell: pinned, and given turns.

The ranks stay connected for the whole cell and sleep on a pipe between their turns, so that contestants can take turns
without starting again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cell import Cell, Model
from benchmarks.contestant import Contestant
from benchmarks.processes import Failed, Processes, cpu_ns


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
        self._scratch = scratch
        self._processes = Processes(scratch, patience_s)
        self._teachers: list[Any] = []
        self._ranks: list[Any] = []

    def start(self) -> None:
        """Fork, connect, and see the right reply arrive at every rank. Raises Failed; `stop` is due in any case."""
        try:
            self.contestant.prepare(self._cell, self.model, self._scratch)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        self._teachers.append(self._processes.fork(self.contestant.teach, self._cell.teacher_core))
        for index, core in enumerate(self._cell.rank_cores):
            self._ranks.append(self._processes.fork_with_pipe(partial(self._obey, index), core))
        self.finish()

    def turn(self, warm: int, requests: int) -> Turn:
        """Every rank makes `warm` requests unmeasured and `requests` measured ones, all ranks at once. Raises Failed."""
        before = self.teacher_cpu_ns()
        self.begin(warm, requests)
        answers = self._processes.collect()
        samples = [sample for samples, _ in answers for sample in samples]
        asked = (warm + requests) * len(answers)
        return Turn(samples, sum(cpu for _, cpu in answers), self.teacher_cpu_ns() - before, asked)

    def begin(self, warm: int, requests: int) -> None:
        """Send the ranks off; `finish` waits for them."""
        self._processes.send((warm, requests))

    def finish(self) -> None:
        """Wait for what `begin` began. Raises Failed."""
        self._processes.collect()

    def teacher_cpu_ns(self) -> int:
        return cpu_ns(self._teachers)

    def rank_cpu_ns(self) -> int:
        """Of all ranks together."""
        return cpu_ns(self._ranks)

    def stop(self) -> None:
        """Let the processes leave, end those that do not, and remove what the contestant made."""
        self._processes.stop()
        self.contestant.close()

    def _obey(self, index: int, pipe: Connection) -> None:
        """In the rank's process."""
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
