#!/usr/bin/env python3
"""What happens when something breaks: every promise of the runtime, tried on real runs.

    python scripts/faults.py                    # all rows; some four minutes on two cores
    python scripts/faults.py 3 7 12             # some
    python scripts/faults.py --list             # what is promised
    python scripts/faults.py --json faults.json # what was found, machine and versions

Each row starts a run of shmbridge-launch on the CPU, with a teacher and a training script of its own in a temporary
directory, breaks it (kill -9, kill -STOP, garbled memory, ...) and measures the time until what was promised has happened.
Exit code 0: all rows hold. D is the deadline of the phase, short here. Needs `pip install -e .[bench]` for the table.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.tables import Facts, header, progress
from faultlines import table
from faultlines.promises import ROWS
from faultlines.rows import Result, Row, play


def main(arguments: Sequence[str] | None = None) -> int:
    """Play the rows that the command line names; 0 where all hold."""
    options = _parser().parse_args(arguments)
    chosen = [ROWS[number] for number in dict.fromkeys(options.rows or ROWS)]
    if options.list:
        for row in chosen:
            print(f"{row.number:2}  {row.fault}: {row.promise} ({row.within})")
        return 0
    facts, began = Facts.now(), time.monotonic()
    results = play_all(chosen, options.jobs, options.slack)
    facts.load_at_end = Facts.now().load_at_start
    to = table.console()
    slack = [f"every limit times {options.slack:g} (--slack)"] if options.slack != 1 else []
    to.print(header("faults", facts, *slack))
    table.show(to, results)
    to.print(table.summary(results, time.monotonic() - began), highlight=False)
    if options.json:
        table.write_json(options.json, facts, results)
    return 0 if all(one.holds for one in results) else 1


def play_all(rows: Sequence[Row], jobs: int, slack: float) -> list[Result]:
    """Those that may have company `jobs` at a time, then the others one by one; in the order of `rows`."""
    found: dict[int, Result] = {}
    with ThreadPoolExecutor(jobs) as pool:
        playing = [pool.submit(play, row, slack) for row in rows if not row.alone]
        try:
            for one in as_completed(playing):
                _note(found, one.result(), len(rows))
        except KeyboardInterrupt:  # those that are being played are ended by their own stages
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for row in rows:
        if row.alone:
            _note(found, play(row, slack), len(rows))
    progress("")
    return [found[row.number] for row in rows]


def _note(found: dict[int, Result], result: Result, count: int) -> None:
    found[result.number] = result
    progress(f"{len(found)} of {count} rows")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("rows", nargs="*", type=_row, metavar="ROW", help="numbers; all by itself")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, where time is not what is promised (2)")
    parser.add_argument("--slack", type=float, default=1.0, help="a machine so many times slower, or as busy (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--list", action="store_true", help="print the promises, and try nothing")
    return parser


def _row(text: str) -> int:
    if not text.isdecimal() or int(text) not in ROWS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a row of 1 to {max(ROWS)}")
    return int(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
