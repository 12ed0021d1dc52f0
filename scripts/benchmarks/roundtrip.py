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
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import machine, report, tables
from benchmarks.bridge import Shmbridge
from benchmarks.cell import Cell, place, size_text
from benchmarks.contestant import Contestant
from benchmarks.gloo import Gloo
from benchmarks.memcpy import Memcpy
from benchmarks.processes import Failed, uninterrupted
from benchmarks.queues import Queues
from benchmarks.raw import Raw
from benchmarks.results import Results, Row, Waiting
from benchmarks.team import Team, Turn
from benchmarks.zeromq import ZeroMq

ROUNDS = 10
QUICK_REQUESTS = 200
SPIN_US = 50
_SETTLE_S, _WATCH_S = 0.2, 1.0


@dataclass
class _Entry:
    """A contestant's team and what its turns gave, or why it failed."""

    contestant: Contestant
    team: Team
    turns: list[Turn] = field(default_factory=list)
    failed: str | None = None


def run(options: argparse.Namespace) -> int:
    """Measure every cell, print the tables, write the JSON. 1 where shmbridge itself failed to run."""
    if options.quick:
        options.ranks, options.requests = options.ranks[:1], min(options.requests, QUICK_REQUESTS)
    cores = machine.physical_cores()
    if len(cores) < 2 and "across" in options.placement:
        print("one core only: no placement across cores", file=sys.stderr)
        options.placement = ["same"]
    cells = [
        place(placement, ranks, nbytes, cores)
        for placement in options.placement
        for nbytes in options.sizes
        for ranks in options.ranks
    ]
    watched = next((cell for cell in cells if cell.placement == "across"), cells[0])
    results = Results(tables.Facts.now(), options.requests)
    for number, cell in enumerate(cells, 1):
        tables.progress(f"[{number}/{len(cells)}] {cell.placement}, {cell.ranks} ranks, {size_text(cell.reply_bytes)}")
        _measure(cell, options, results, watch=cell is watched)
    results.facts.load_at_end = machine.load()
    tables.progress("")
    report.show(results, __doc__)
    if options.json:
        report.write_json(results, options.json)
    return int(any(row.failed for row in results.rows if row.contestant == Shmbridge().name))


def contestants(cell: Cell) -> list[Contestant]:
    """Who takes part in a cell, in the table's order."""
    found: list[Contestant] = [Raw()]
    if cell.large and cell.ranks == 1:
        found.append(Memcpy())
    found += [Shmbridge(), Shmbridge(copied=True)]
    if not cell.large and cell.core_each:
        found.append(Shmbridge(spin_us=SPIN_US))
    return [*found, ZeroMq(), Gloo(), Queues()]


def _measure(cell: Cell, options: argparse.Namespace, results: Results, *, watch: bool) -> None:
    requests = max(1, options.requests // (10 if cell.large else 1))
    with tempfile.TemporaryDirectory(prefix="shmbridge-bench-") as scratch, _teams(cell, scratch, options) as entries:
        for turn in range(ROUNDS):
            first = turn % len(entries)
            for entry in [*entries[first:], *entries[:first]]:
                _take_turn(entry, max(1, requests // ROUNDS))
        if watch:
            results.waiting += _watch([entry for entry in entries if entry.failed is None])
    results.add([_row(cell, entry) for entry in entries])


@contextmanager
def _teams(cell: Cell, scratch: str, options: argparse.Namespace) -> Iterator[list[_Entry]]:
    """Every contestant of the cell, started; stopped at the end, whatever happens."""
    entries: list[_Entry] = []
    try:
        for number, contestant in enumerate(contestants(cell)):
            directory = Path(scratch) / str(number)
            directory.mkdir()
            entry = _Entry(contestant, Team(contestant, cell, directory, options.patience))
            entries.append(entry)
            with _noting(entry):
                entry.team.start()
        yield entries
    finally:
        with uninterrupted():
            for entry in entries:
                entry.team.stop()


@contextmanager
def _noting(entry: _Entry) -> Iterator[None]:
    """A Failed takes the contestant out of the cell; the others go on."""
    try:
        yield
    except Failed as error:
        entry.failed = str(error)
        entry.team.stop()


def _take_turn(entry: _Entry, requests: int) -> None:
    if entry.failed is None:
        with _noting(entry):
            entry.turns.append(entry.team.turn(max(2, requests // 10), requests))


def _row(cell: Cell, entry: _Entry) -> Row:
    row = Row(cell.placement, cell.ranks, cell.reply_bytes, entry.contestant.name, entry.contestant.ranked)
    if entry.failed is not None:
        row.failed = entry.failed
        return row
    samples = np.array([sample for turn in entry.turns for sample in turn.samples_ns]) / 1000
    row.samples = len(samples)
    row.min_us, row.p50_us, row.p90_us = (float(value) for value in np.percentile(samples, (0, 50, 90)))
    row.rank_cpu_us = sum(turn.rank_cpu_ns for turn in entry.turns) / 1000 / len(samples)
    asked = sum(turn.teacher_requests for turn in entry.turns)
    row.teacher_cpu_us = sum(turn.teacher_cpu_ns for turn in entry.turns) / 1000 / asked
    return row


def _watch(entries: Sequence[_Entry]) -> list[Waiting]:
    """CPU time while nothing happens: of teachers without a request, then of ranks whose teacher's forward sleeps."""
    teams = [entry.team for entry in entries]
    before = [team.teacher_cpu_ns() for team in teams]
    started = time.perf_counter()
    time.sleep(_WATCH_S)
    idle = _percent(before, [team.teacher_cpu_ns() for team in teams], started)
    for team in teams:
        team.model.pause_s = _WATCH_S + 2 * _SETTLE_S
        team.begin(0, 1)
    time.sleep(_SETTLE_S)
    before = [team.rank_cpu_ns() for team in teams]
    started = time.perf_counter()
    time.sleep(_WATCH_S)
    asking = _percent(before, [team.rank_cpu_ns() for team in teams], started)
    for entry in entries:
        entry.team.model.pause_s = 0.0
        with suppress(Failed):
            entry.team.finish()
    names = [entry.contestant.name for entry in entries]
    return [Waiting(*values) for values in zip(names, idle, asking, strict=True)]


def _percent(before: Sequence[int], after: Sequence[int], started: float) -> list[float]:
    elapsed_ns = (time.perf_counter() - started) * 1e9
    return [100 * (b - a) / elapsed_ns for a, b in zip(before, after, strict=True)]
