"""How the rows are shown and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.tables import Facts
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from faultlines.rows import Result

WIDTH = 118


def console() -> Console:
    """For standard output, of one width everywhere."""
    return Console(width=WIDTH, highlight=False)


def show(to: Console, results: Sequence[Result]) -> None:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, leading=1)
    made.add_column("#", justify="right", no_wrap=True)
    made.add_column("fault", width=24)
    made.add_column("within", width=9)
    made.add_column("seen")
    made.add_column("seconds", justify="right", no_wrap=True)
    made.add_column("ended", justify="right", no_wrap=True)
    made.add_column("holds", no_wrap=True)
    for one in results:
        holds = Text("yes", "green") if one.holds else Text("NO", "bold red")
        cells = Text(one.fault), one.within, Text(_told(one)), _seconds(one.seconds), _seconds(one.ended_s)
        made.add_row(str(one.number), *cells, holds)
    to.print(made)


def summary(results: Sequence[Result], elapsed_s: float) -> str:
    """One line under the table."""
    wrong = [str(one.number) for one in results if not one.holds]
    rows = f"{len(results)} row{'s' if len(results) != 1 else ''} in {elapsed_s:.0f} s"
    if wrong:
        return f"{rows}; row {', '.join(wrong)} does not hold"
    return f"{rows}; all hold. No process and no object in /dev/shm was left by any."


def write_json(path: Path, facts: Facts, results: Sequence[Result]) -> None:
    rows = [{**asdict(one), "holds": one.holds} for one in results]
    path.write_text(json.dumps({**asdict(facts), "rows": rows}, indent=1) + "\n")


def _seconds(found: float | None) -> str:
    return "" if found is None else f"{found:.2f}"


def _told(one: Result) -> str:
    return "; ".join(filter(None, [*(f"NOT: {wrong}" for wrong in one.wrong), one.seen]))
