"""The figures of `bench.py roundtrip`, what they say about the targets, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from benchmarks import tables
from benchmarks.tables import Target, size_text
from benchmarks.transports import LARGE, Memcpy, Raw, Shmbridge

OURS = Shmbridge.name
SMALL_X_RAW = {"across": 1.3, "same": 2.2}
LARGE_X_MEMCPY = 1.1
FLAT_X = 1.1  # per-rank CPU time of the teacher, against one rank
IDLE_PERCENT = 1.0
_TITLES = {
    "same": "same core: the teacher and all ranks share one core",
    "across": "across cores: the teacher alone on one core, the ranks on the others (shared where they are fewer)",
}


@dataclass
class Row:
    """One contestant in one cell; microseconds. CPU times are per request of one rank, over all threads."""

    placement: str
    ranks: int
    reply_bytes: int
    contestant: str
    ranked: bool
    samples: int = 0
    min_us: float = 0.0
    p50_us: float = 0.0
    p90_us: float = 0.0
    x_raw: float | None = None
    first: bool = False
    rank_cpu_us: float = 0.0
    teacher_cpu_us: float = 0.0
    failed: str | None = None

    @property
    def cell(self) -> tuple[str, int, int]:
        return self.placement, self.reply_bytes, self.ranks


class Waiting(NamedTuple):
    """CPU time of a process that has nothing to do, in percent of a core."""

    contestant: str
    idle_teacher_percent: float
    waiting_rank_percent: float


def compared(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows of one cell, with the ratio to the raw limit, and who is first."""
    ran = [row for row in rows if not row.failed]
    for raw in _of(ran, Raw.name):
        for row in ran:
            row.x_raw = row.p50_us / raw.p50_us
    if ranked := [row for row in ran if row.ranked]:
        min(ranked, key=lambda row: row.p50_us).first = True
    return rows


def _of(rows: Iterable[Row], contestant: str) -> list[Row]:
    """The contestant's rows that did not fail."""
    return [row for row in rows if row.contestant == contestant and not row.failed]


def _teacher_costs(rows: Iterable[Row]) -> dict[tuple[str, int], dict[int, float]]:
    """(placement, reply_bytes) to {ranks: CPU us of the teacher for each request}, of shmbridge."""
    costs: dict[tuple[str, int], dict[int, float]] = {}
    for row in sorted(_of(rows, OURS), key=lambda row: row.ranks):
        costs.setdefault((row.placement, row.reply_bytes), {})[row.ranks] = row.teacher_cpu_us
    return costs


# Targets


def targets(rows: Sequence[Row], waiting: Sequence[Waiting]) -> list[Target]:
    """Every target with its figure."""
    ours, bare = _of(rows, OURS), {row.cell: row.p50_us for row in _of(rows, Memcpy.name)}
    placements = dict.fromkeys(row.placement for row in rows)
    found = []
    for placement in placements:
        small = [row for row in ours if row.placement == placement and row.reply_bytes < LARGE]
        ratios = {row.ranks: row.x_raw for row in small if row.x_raw}
        found.append(_ratios(f"small reply, {placement}: p50 / raw limit", SMALL_X_RAW[placement], ratios))
    for placement in placements:  # one memcpy is measured with one rank and large replies
        large = [row for row in ours if row.placement == placement and row.cell in bare]
        ratios = {row.ranks: row.p50_us / bare[row.cell] for row in large}
        found.append(_ratios(f"large reply leased, {placement}: p50 / bare memcpy", LARGE_X_MEMCPY, ratios))
    found.append(_first(rows))
    for (placement, nbytes), costs in _teacher_costs(rows).items():
        one, *_ = costs.values()
        ratios = {ranks: cost / one for ranks, cost in [*costs.items()][1:]}
        found.append(_ratios(f"teacher CPU, {placement}, {size_text(nbytes)}: / one rank", FLAT_X, ratios))
    (idle, asking), *_ = [(each[1], each[2]) for each in waiting if each.contestant == OURS] or [(None, None)]
    for text, percent in (("CPU of a teacher without requests", idle), ("CPU of a rank that waits 1 s", asking)):
        told, reached = ("not measured", None) if percent is None else (f"{percent:.2f} %", percent <= IDLE_PERCENT)
        found.append(Target(text, f"{IDLE_PERCENT:g} %", told, reached))
    return found


def _ratios(text: str, limit: float, found: dict[int, float]) -> Target:
    """Reached where every number of ranks keeps the limit."""
    told = "  ".join(f"{value:.2f}x ({ranks}r)" for ranks, value in sorted(found.items()))
    reached = max(found.values()) <= limit if found else None
    return Target(text, f"{limit:g}x", told or "not measured", reached)


def _first(rows: Iterable[Row]) -> Target:
    """Our variants are no competition for each other."""
    cells, lost = 0, []
    for (placement, nbytes, ranks), members in groupby(rows, key=lambda row: row.cell):
        ranked = [row for row in members if row.ranked and not row.failed]
        peers = [row.p50_us for row in ranked if not row.contestant.startswith(OURS)]
        cells += 1
        if not any(ours.p50_us < min(peers, default=float("inf")) for ours in _of(ranked, OURS)):
            lost.append(f"{placement} {size_text(nbytes)} {ranks}r")
    found = f"{cells - len(lost)} of {cells}" + (f"; not {', '.join(lost)}" if lost else "")
    return Target("first among the peers in every section", "all", found, not lost)


# Tables


def shown(rows: Sequence[Row], waiting: Sequence[Waiting]) -> Iterator[Any]:
    """Tables with their titles, and remarks."""
    for placement, members in groupby(rows, key=lambda row: row.placement):
        numbers = ("p50", "p90", "x raw", "teacher CPU", "rank CPU", "")
        cells = [_cells(row) for row in members]
        yield _TITLES[placement], tables.table(("transport",), numbers, keys=("reply", "ranks"), rows=cells, grouped=2)
    yield (
        "x raw: p50 against the raw limit's in the same section. CPU: of one request, all threads of the process. "
        "shmbridge holds the reply under a lease, in place, and the first pass over it is the reader's; exchange copies "
        "it out."
    )
    for row in rows:
        if row.failed:
            where = f"{row.placement}, {size_text(row.reply_bytes)}, {row.ranks} ranks"
            yield Text(f"failed: {row.contestant} ({where}): {row.failed}", style="red")
    yield "shmbridge: the teacher's CPU time for each request of a rank", _costs_table(rows)
    if waiting:
        numbers = ("teacher without a request", "rank during a long forward")
        percents = [(name, f"{idle:.2f} %", f"{asking:.2f} %") for name, idle, asking in waiting]
        title = "CPU while waiting, percent of a core, over one second"
        yield title, tables.table(("transport",), numbers, rows=percents)


def _cells(row: Row) -> tuple[str, ...]:
    where = size_text(row.reply_bytes), str(row.ranks), row.contestant
    if row.failed:
        return (*where, "failed", *[""] * 5, "red")
    times = [_time(us) for us in (row.p50_us, row.p90_us, row.teacher_cpu_us, row.rank_cpu_us)]
    ratio = f"{row.x_raw:.2f}" if row.x_raw else ""
    style = "bold green" if row.first else "" if row.ranked else "dim"
    return (*where, *times[:2], ratio, *times[2:], "first" if row.first else "", style)


def _costs_table(rows: Sequence[Row]) -> Table:
    numbers = sorted({row.ranks for row in rows})
    lines = []
    for (placement, nbytes), costs in _teacher_costs(rows).items():
        one, *_ = costs.values()
        values = [f"{_time(costs[n])}  {costs[n] / one:.2f}x" if n in costs else "" for n in numbers]
        lines.append((placement, size_text(nbytes), *values))
    names = ("reply", *(f"{ranks} rank" + "s" * (ranks > 1) for ranks in numbers))
    return tables.table(("placement",), names, rows=lines)


def _time(us: float) -> str:
    if us >= 1000:
        return f"{us / 1000:.2f} ms"
    return f"{us:.1f} us" if us < 100 else f"{us:.0f} us"
