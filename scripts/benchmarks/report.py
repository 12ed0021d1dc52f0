"""The figures as tables on the terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.table import Table
from rich.text import Text

from benchmarks import tables
from benchmarks.cell import size_text
from benchmarks.results import Results, Row

_PLACEMENTS = {
    "same": "same core: the teacher and all ranks share one core",
    "across": "across cores: the teacher alone on one core, the ranks on the others (shared where they are fewer)",
}


def show(results: Results, about: str | None) -> None:
    """Print everything."""
    console = tables.console()
    console.print(tables.header("roundtrip", results.facts))
    console.print(tables.about(about), style="dim")
    for placement, rows in groupby(results.rows, key=lambda row: row.placement):
        tables.show(console, _PLACEMENTS[placement], _roundtrips(list(rows)))
    console.print(
        "x raw: p50 against the raw limit's in the same section. CPU: of one request, all threads of the process. "
        "shmbridge holds the reply under a lease, in place, and the first pass over it is the reader's; exchange copies "
        "it out.",
        style="dim",
    )
    for row in results.rows:
        if row.failed:
            where = f"{row.placement}, {size_text(row.reply_bytes)}, {row.ranks} ranks"
            console.print(Text(f"failed: {row.contestant} ({where}): {row.failed}", style="red"))
    tables.show(console, "shmbridge: the teacher's CPU time for each request of a rank", _teacher_costs(results))
    if results.waiting:
        tables.show(console, "CPU while waiting, percent of a core, over one second", _waiting(results))
    tables.show(console, "targets, for shmbridge under a lease (r: ranks)", tables.targets(results.targets()))


def write_json(results: Results, path: Path) -> None:
    """Every figure, with the machine, the versions and the targets."""
    figures = asdict(results)
    tables.write_json(path, "roundtrip", figures.pop("facts"), figures, results.targets())


def _roundtrips(rows: list[Row]) -> Table:
    table = tables.table()
    for name in ("reply", "ranks"):
        table.add_column(name, justify="right")
    table.add_column("transport", no_wrap=True)
    for name in ("p50", "p90", "x raw", "teacher CPU", "rank CPU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for cell, members in groupby(rows, key=lambda row: row.cell):
        where = [size_text(cell[1]), str(cell[2])]
        for row in members:
            table.add_row(*where, *_cells(row), style=_style(row))
            where = ["", ""]
        table.add_section()
    return table


def _style(row: Row) -> str:
    return "red" if row.failed else "bold green" if row.first else "" if row.ranked else "dim"


def _cells(row: Row) -> list[str]:
    if row.failed:
        return [row.contestant, "failed", *[""] * 5]
    ratio = f"{row.x_raw:.2f}" if row.x_raw else ""
    times = [_time(row.p50_us), _time(row.p90_us), ratio, _time(row.teacher_cpu_us), _time(row.rank_cpu_us)]
    return [row.contestant, *times, "first" if row.first else ""]


def _time(us: float) -> str:
    if us >= 1000:
        return f"{us / 1000:.2f} ms"
    return f"{us:.1f} us" if us < 100 else f"{us:.0f} us"


def _teacher_costs(results: Results) -> Table:
    table = tables.table()
    table.add_column("placement")
    table.add_column("reply", justify="right")
    numbers = sorted({row.ranks for row in results.rows})
    for ranks in numbers:
        table.add_column(f"{ranks} rank" + "s" * (ranks > 1), justify="right")
    for placement, nbytes, costs in results.teacher_costs():
        base = next(iter(costs.values()))
        values = [f"{_time(costs[n])}  {costs[n] / base:.2f}x" if n in costs else "" for n in numbers]
        table.add_row(placement, size_text(nbytes), *values)
    return table


def _waiting(results: Results) -> Table:
    table = tables.table()
    table.add_column("transport")
    table.add_column("teacher without a request", justify="right")
    table.add_column("rank during a long forward", justify="right")
    for waiting in results.waiting:
        values = (waiting.idle_teacher_percent, waiting.waiting_rank_percent)
        table.add_row(waiting.contestant, *(f"{value:.2f} %" for value in values))
    return table
