"""What the output of every benchmark has in common: the machine, tables, targets, JSON, and progress on a terminal."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PACKAGES = ("torch", "numpy", "pyzmq", "posix_ipc", "shmbridge")
_WIDTH = 100


def physical_cores() -> list[int]:
    """One allowed CPU of each physical core: hardware threads of one core share its caches and its wake-ups."""
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), cpu)
    return list(cores.values())


def load() -> list[float]:
    """The load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


@dataclass
class Facts:
    """Where and when a run was made."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    load_at_start: list[float]
    load_at_end: list[float] = field(default_factory=list)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def now(cls) -> Facts:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
        machine: dict[str, str | int] = {
            "cpu": model[1] if model else platform.processor(),
            "cpus_allowed": len(os.sched_getaffinity(0)),
            "physical_cores_allowed": len(physical_cores()),
            "virtual_machine": "yes" if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.M) else "no",
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            "kernel": platform.release(),
        }
        return cls(machine, {"python": platform.python_version(), **dict(map(_version, PACKAGES))}, load())


def _version(package: str) -> tuple[str, str]:
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        return package, "absent"


@dataclass
class Target:
    """`reached` is None where the run did not measure it."""

    text: str
    limit: str
    found: str
    reached: bool | None


def report(
    name: str,
    about: str | None,
    facts: Facts,
    settings: Sequence[str],
    shown: Iterable[tuple[str, Table] | Table | Text | str],
    targets: Sequence[Target] | None = None,
    figures: Mapping[str, Any] | None = None,
    path: Path | None = None,
    title: str = "targets",
) -> None:
    """Print a finished run, and write it to `path` where one is given.

    Args:
        about: The module's docstring; all but its first paragraph is printed.
        settings: Lines of the header.
        shown: Tables with their titles; strings are remarks about the table before.
        targets: The last table, below `title`; None where the benchmark has none.
        figures: What the file gets beside facts and targets.
    """
    facts.load_at_end = load()
    progress("")
    to = Console(highlight=False)
    if not to.is_terminal:
        to.width = _WIDTH
    to.print(header(name, facts, *settings), soft_wrap=True)
    if about:
        _, *paragraphs = about.strip().split("\n\n")
        to.print("\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs), style="dim")
    for each in (*shown, *([] if targets is None else [(title, _targets(targets))])):
        if isinstance(each, tuple):
            to.print(f"\n{each[0]}", style="bold")
            to.print(each[1])
        else:
            to.print(each, style="dim" if isinstance(each, str) else "")
    if path:
        tree = {
            "benchmark": name,
            **asdict(facts),
            **(figures or {}),
            "targets": [asdict(each) for each in targets or ()],
        }
        path.write_text(json.dumps(tree, indent=1) + "\n")


def header(name: str, facts: Facts, *lines: str) -> Text:
    """Benchmark, date, load; machine; versions; what else belongs above a table."""
    found = facts.machine
    kind = "virtual machine" if found["virtual_machine"] == "yes" else "no virtual machine"
    loads = " to ".join(" ".join(map(str, each)) for each in (facts.load_at_start, facts.load_at_end))
    cores, memory, kernel = found["physical_cores_allowed"], found["memory_gib"], found["kernel"]
    above = (
        f"  {facts.date}  load {loads}",
        f"{found['cpu']}, {cores} cores, {memory} GiB, {kind}, Linux {kernel}",
        ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        *lines,
    )
    return Text.assemble((name, "bold"), "\n".join(above))


def table(
    texts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    *,
    keys: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    grouped: int = 0,
) -> Table:
    """Columns of text on the left, then columns of numbers.

    Args:
        keys: Columns of numbers before the texts.
        rows: One string for each column, and behind them a style for the row where it has one.
        grouped: So many cells at the left are shown where they change, below an empty line.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for names, justify in ((keys, "right"), (texts, "left"), (numbers, "right")):
        for name in names:
            made.add_column(name, justify=justify, no_wrap=True)
    before: Sequence[str] = ()
    for row in rows:
        cells, style = row[: len(made.columns)], "".join(row[len(made.columns) :])
        same = bool(grouped) and row[:grouped] == before
        if grouped and before and not same:
            made.add_section()
        made.add_row(*([""] * grouped if same else cells[:grouped]), *cells[grouped:], style=style)
        before = row[:grouped]
    return made


def _targets(found: Sequence[Target]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("target", "limit", "found", ""):
        made.add_column(name, justify="right" if name == "limit" else "left")
    verdicts = {True: Text("reached", "green"), False: Text("missed", "bold red"), None: Text("-")}
    for each in found:
        made.add_row(each.text, each.limit, each.found, verdicts[each.reached])
    return made


def size_text(nbytes: int) -> str:
    """1024 -> `1 KB`."""
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if nbytes % size == 0:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"


def progress(text: str) -> None:
    """On a terminal only; each takes the place of the one before."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
