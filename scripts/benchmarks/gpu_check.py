"""The table of scripts/gpu_check.sh: `python -m benchmarks.gpu_check TESTS.XML BENCH.JSON`; its exit code.

Tests are grouped by their names without parameters. What is missing counts as failed: a run that broke off proves nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from benchmarks import tables
from benchmarks.tables import Target


@dataclass
class Group:
    """The tests of one name."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reason: str = ""  # of the last that was skipped


def groups(report: Path) -> list[Group]:
    """Of a JUnit file; none where it is not there."""
    if not report.exists():
        return []
    found: dict[str, Group] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name', '').partition('[')[0]}"
        group = found.setdefault(name, Group(name))
        skipped = case.find("skipped")
        if skipped is not None:
            group.skipped += 1
            group.reason = skipped.get("message", "")
        elif case.find("failure") is not None or case.find("error") is not None:
            group.failed += 1
        else:
            group.passed += 1
    return list(found.values())


def targets(report: Path) -> list[Target]:
    """Of the benchmark's JSON; one that is not measured where it is not there."""
    if not report.exists():
        return [Target("benchmark", "", "did not run to its end", None)]
    return [Target(**target) for target in json.loads(report.read_text())["targets"]]


def holds(tests: Sequence[Group], aims: Sequence[Target]) -> bool:
    """Every test that could run passed, some did, and every target is reached."""
    ran = any(group.passed for group in tests) and not any(group.failed for group in tests)
    skipped = [group for group in tests if group.skipped and "GPUs, there" not in group.reason]
    return ran and not skipped and all(target.reached for target in aims)


def shown(tests: Sequence[Group]) -> Table:
    made = tables.table(("tests",), ("passed", "failed", "skipped"))
    made.add_column("")
    for group in tests:
        word, style = ("failed", "bold red") if group.failed else ("passed", "green") if group.passed else ("-", "")
        counts = (str(count or "") for count in (group.passed, group.failed, group.skipped))
        made.add_row(group.name, *counts, Text(group.reason or word, style))
    return made


def device() -> str:
    """Cards, driver and versions, in one line."""
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__})"
    cards = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{cards}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def main(tests: Path, bench: Path) -> int:
    found, aims = groups(tests), targets(bench)
    facts = tables.Facts.now()
    if bench.exists():
        cards = json.loads(bench.read_text())["gpus"]
        told = ", ".join(f"{name} {what}" for name, what in cards.items())
    else:
        told = ""
    console = tables.console()
    facts.load_at_end = facts.load_at_start
    console.print(tables.header("gpu_check", facts, device(), told))
    tables.show(console, "tests", shown(found))
    tables.show(console, "targets", tables.targets(aims))
    good = holds(found, aims)
    console.print("\nall of it holds" if good else "\nnot all of it holds", style="bold green" if good else "bold red")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
