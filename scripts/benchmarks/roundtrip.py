"""Round trips, side by side in one run: 64 KB of token IDs from each rank to the teacher, a reply of the given size back.

The teacher's model does nothing, so only the transport is measured. All contestants of a section are alive at once and
take turns, in rounds that start with another one each time, so that drift of the machine meets all alike. Every process is
pinned: `same` puts all of them on one core, `across` the teacher on a core of its own and the ranks on the others as far
as there are any. One thread each, garbage collection off. With several ranks, all ask at once, and the figures are one
rank's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks import roundtrip_results, tables
from benchmarks.processes import Failed, Processes, cpu_ns, undoing
from benchmarks.roundtrip_results import OURS, Row, Waiting
from benchmarks.tables import size_text
from benchmarks.transports import Ask, Cell, Transport

QUICK = {"ranks": [1], "requests": 200}
ROUNDS = 10
_SETTLE_S, _WATCH_S = 0.2, 1.0


def run(options: argparse.Namespace) -> int:
    """Measure every cell, print the tables, write the JSON. 1 where shmbridge itself failed to run."""
    cores = tables.physical_cores()
    if len(cores) < 2 and "across" in options.placement:
        print("one core only: no placement across cores", file=sys.stderr)
        options.placement = ["same"]
    cells = [
        Cell(placement, ranks, nbytes, cores)
        for placement in options.placement
        for nbytes in options.sizes
        for ranks in options.ranks
    ]
    watched = next((cell for cell in cells if cell.placement == "across"), cells[0])
    facts = tables.Facts.now()
    rows: list[Row] = []
    waiting: list[Waiting] = []
    for number, cell in enumerate(cells, 1):
        told = f"{cell.placement}, {cell.ranks} ranks, {size_text(cell.reply_bytes)}"
        tables.progress(f"[{number}/{len(cells)}] {told}")
        with _teams(cell, options.patience) as teams:
            _measure(teams, max(1, options.requests // (10 if cell.large else 1)))
            if cell is watched:
                waiting = _watch(cell, [team for team in teams if team.failed is None])
            rows += roundtrip_results.compared([team.row() for team in teams])
    tables.report(
        "roundtrip",
        __doc__,
        facts,
        settings=(),
        shown=roundtrip_results.shown(rows, waiting),
        targets=roundtrip_results.targets(rows, waiting),
        figures={
            "requests": options.requests,
            "rows": [asdict(row) for row in rows],
            "waiting": [each._asdict() for each in waiting],
        },
        path=options.json,
        title="targets, for shmbridge under a lease (r: ranks)",
    )
    return int(any(row.failed for row in rows if row.contestant == OURS))


class Team:
    """The processes of one transport in a cell: a teacher and its ranks, pinned, and what their turns gave.

    The ranks stay connected for the whole cell and sleep on a pipe between their turns.
    """

    def __init__(self, transport: type[Transport], cell: Cell, patience_s: float) -> None:
        self.name = transport.name
        self.failed: str | None = None
        self._cell = cell
        self._processes = Processes(patience_s)
        self._transport = transport(cell, self._processes.directory)
        self._teachers: list[Any] = []
        self._ranks: list[Any] = []
        self._samples_ns: list[int] = []
        self._rank_cpu_ns = self._teacher_cpu_ns = self._asked = 0

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A Failed takes the transport out of the cell; the others go on."""
        try:
            yield
        except Failed as error:
            self.failed = str(error)
            self.stop()

    def start(self) -> None:
        """Fork, connect, and see the right reply arrive at every rank. Raises Failed; `stop` is due in any case."""
        try:
            self._transport.prepare()
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        self._teachers = [self._processes.fork(self._transport.teach, self._cell.teacher_core)]
        for index, core in enumerate(self._cell.rank_cores):
            self._ranks.append(self._processes.fork_with_pipe(partial(self._obey, index), core))
        self.finish()

    def turn(self, warm: int, requests: int) -> None:
        """Every rank makes `warm` requests unmeasured and `requests` measured ones, all ranks at once. Raises Failed."""
        before = self.teacher_cpu_ns()
        self.begin(warm, requests)
        answers = self.finish()
        self._teacher_cpu_ns += self.teacher_cpu_ns() - before
        for samples_ns, cpu in answers:
            self._samples_ns += samples_ns
            self._rank_cpu_ns += cpu
            self._asked += warm + requests

    def begin(self, warm: int, requests: int) -> None:
        """Send the ranks off; `finish` waits for them."""
        self._processes.send((warm, requests))

    def finish(self) -> list[Any]:
        """Wait for what `begin` began. Raises Failed."""
        return self._processes.collect()

    def teacher_cpu_ns(self) -> int:
        return cpu_ns(self._teachers)

    def rank_cpu_ns(self) -> int:
        """Of all ranks together."""
        return cpu_ns(self._ranks)

    def stop(self) -> None:
        """Let the processes leave, end those that do not, and remove what the transport made."""
        self._processes.stop()
        self._transport.close()

    def row(self) -> Row:
        cell, transport = self._cell, self._transport
        row = Row(cell.placement, cell.ranks, cell.reply_bytes, transport.name, transport.ranked, failed=self.failed)
        if not self.failed:
            samples_us = np.array(self._samples_ns) / 1000
            row.samples = len(samples_us)
            row.min_us, row.p50_us, row.p90_us = (float(value) for value in np.percentile(samples_us, (0, 50, 90)))
            row.rank_cpu_us = self._rank_cpu_ns / 1000 / len(samples_us)
            row.teacher_cpu_us = self._teacher_cpu_ns / 1000 / self._asked
        return row

    def _obey(self, index: int, pipe: Connection) -> None:
        """In the rank's process."""
        with self._transport.rank(index) as ask:
            ask(self._cell.check)
            pipe.send(None)
            while (order := pipe.recv()) is not None:
                warm, requests = order
                for _ in range(warm):
                    ask(_ignore)
                pipe.send(_timed(ask, requests))


def _timed(ask: Ask, requests: int) -> tuple[list[int], int]:
    """Nanoseconds of each request, and CPU nanoseconds of all together (every thread of this process)."""
    clock = time.perf_counter_ns
    samples = [0] * requests
    cpu = time.process_time_ns()
    for i in range(requests):
        started = clock()
        ask(_ignore)
        samples[i] = clock() - started
    return samples, time.process_time_ns() - cpu


def _ignore(reply: Any) -> None:
    pass


@contextmanager
def _teams(cell: Cell, patience_s: float) -> Iterator[list[Team]]:
    """Every transport of the cell, started; stopped at the end, whatever happens."""
    teams: list[Team] = []
    with undoing() as undo:
        for transport in cell.transports():
            teams.append(team := Team(transport, cell, patience_s))
            undo.callback(team.stop)
            with team.noting():
                team.start()
        yield teams


def _measure(teams: Sequence[Team], requests: int) -> None:
    for turn in range(ROUNDS):
        first = turn % len(teams)
        for team in [*teams[first:], *teams[:first]]:
            if team.failed is None:
                with team.noting():
                    team.turn(max(2, requests // ROUNDS // 10), max(1, requests // ROUNDS))


def _watch(cell: Cell, teams: Sequence[Team]) -> list[Waiting]:
    """CPU time while nothing happens: of teachers without a request, then of ranks whose teacher's forward sleeps."""
    idle = _percent([team.teacher_cpu_ns for team in teams])
    cell.pause_s[0] = _WATCH_S + 2 * _SETTLE_S
    for team in teams:
        team.begin(0, 1)
    time.sleep(_SETTLE_S)
    asking = _percent([team.rank_cpu_ns for team in teams])
    cell.pause_s[0] = 0.0
    for team in teams:
        with suppress(Failed):
            team.finish()
    return [Waiting(team.name, *values) for team, *values in zip(teams, idle, asking, strict=True)]


def _percent(cpu_ns_of: Sequence[Callable[[], int]]) -> list[float]:
    """CPU time in percent of a core, while the machine is watched."""
    before, started = [read() for read in cpu_ns_of], time.perf_counter_ns()
    time.sleep(_WATCH_S)
    used = [read() - old for read, old in zip(cpu_ns_of, before, strict=True)]
    return [100 * ns / (time.perf_counter_ns() - started) for ns in used]
