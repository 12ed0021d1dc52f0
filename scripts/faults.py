#!/usr/bin/env python3
"""What happens when something breaks: runs the tests that keep the promises of docs/reliability.md, and prints what they saw.

    python scripts/faults.py                    # every promise; two to three minutes on two cores
    python scripts/faults.py 3 7 12             # some
    python scripts/faults.py --json faults.json # also write what was seen, with machine and versions

The tests break real processes (kill -9, kill -STOP, garbled memory, ...) and measure the time from the fault to what is
promised. D is the deadline of the phase, short here. Exit code 0: every promise holds. Needs `pip install -e .[test]`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from benchmarks.tables import Facts, header
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.promise import Seen, of

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
WIDTH = 118


@dataclass
class Row:
    """A promise of docs/reliability.md, and what its tests reported."""

    number: int
    fault: str
    expected: str
    within: str
    seen: list[Seen] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.seen) and not self.wrong

    @property
    def worst(self) -> Seen | None:
        """What came closest to its limit."""
        return max(
            (one for one in self.seen if one.took_s), key=lambda one: one.took_s / (one.limit_s or 1), default=None
        )

    @property
    def text(self) -> str:
        """What was wrong, then what was seen: a line each, with how often where it was more than once."""
        counts = Counter(one.text for one in self.seen)
        lines = [text if count == 1 else f"{count} times: {text}" for text, count in counts.items()]
        return "\n".join([*(f"NOT: {wrong}" for wrong in self.wrong), *lines]) or "NOT: no test reported anything"


def promises() -> dict[int, Row]:
    """The rows of the list in docs/reliability.md, by number."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    found = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)
    return {int(number): Row(int(number), fault, expected, within) for number, fault, expected, within in found}


class Collector:
    """A pytest plugin that adds what the tests report to the rows."""

    def __init__(self, rows: dict[int, Row], slack: float) -> None:
        self._rows, self._slack = rows, slack

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self._rows[dict(report.user_properties)["row"]]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else report.longreprtext
            row.wrong.append(f"{report.nodeid.rpartition('::')[2]}: {why.splitlines()[0]}")
        for one in of(report) if report.when == "call" else []:
            row.seen.append(one)
            if one.took_s and one.limit_s and one.took_s > one.limit_s * self._slack:
                row.wrong.append(f"{one.text}: {one.took_s:.2f} s, promised within {one.limit_s:g} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests of the rows that the command line names; 0 where all of them hold."""
    rows = promises()
    parser = _parser()
    options = parser.parse_args(arguments)
    for number in options.rows:
        if number not in rows:
            parser.error(f"{number} is not a row of 1 to {max(rows)}")
    chosen = {number: rows[number] for number in sorted(set(options.rows or rows))}
    facts, began = Facts.now(), time.monotonic()
    status = run(chosen, options.slack, options.jobs)
    facts.load_at_end = Facts.now().load_at_start
    to = Console(width=WIDTH, highlight=False)
    to.print(header("faults", facts))
    to.print(_table(list(chosen.values())))
    wrong = [str(row.number) for row in chosen.values() if not row.holds]
    told = f"{len(chosen)} promises in {time.monotonic() - began:.0f} s"
    to.print(f"{told}; {', '.join(wrong)} did not hold" if wrong else f"{told}; all hold")
    if options.json:
        tree = [{**asdict(row), "holds": row.holds} for row in chosen.values()]
        options.json.write_text(json.dumps({**asdict(facts), "rows": tree}, indent=1) + "\n")
    return 1 if wrong or status else 0


def run(rows: dict[int, Row], slack: float, jobs: int) -> int:
    """Run the tests of these rows, which get what was seen; pytest's exit status."""
    files = [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "mark.promise(" in file.read_text()]
    arguments = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    arguments += ["-q", "--no-header", "--tb=short", "-rN", "-m", "promise and not matrix"]
    arguments += [f"--promise={row}" for row in rows]
    arguments += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    return pytest.main([*files, *arguments], plugins=[Collector(rows, slack)])


def _table(rows: Sequence[Row]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, leading=1)
    made.add_column("#", justify="right", no_wrap=True)
    made.add_column("fault: what is expected", width=38)
    made.add_column("within", width=9)
    made.add_column("seen")
    made.add_column("seconds", justify="right", no_wrap=True)
    made.add_column("exit", justify="right", no_wrap=True)
    made.add_column("holds", no_wrap=True)
    for row in rows:
        seconds = f"{row.worst.took_s:.2f}" if row.worst else ""
        codes = sorted({str(one.exit_code) for one in row.seen if one.exit_code is not None}, key=int)
        holds = Text("yes", "green") if row.holds else Text("NO", "bold red")
        fault = Text.assemble((row.fault, "bold"), f": {row.expected}")
        made.add_row(str(row.number), fault, row.within, Text(row.text), seconds, "\n".join(codes), holds)
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time (2)")
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW", help="numbers (all)")
    parser.add_argument(
        "--slack", type=float, default=1.0, help="multiplies every limit, for a slow or busy machine (1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen")
    return parser


if __name__ == "__main__":
    sys.exit(main())
