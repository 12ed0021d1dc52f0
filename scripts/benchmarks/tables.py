"""What every benchmark's output has in common: the header, the look of a table, progress on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import machine

_WIDTH = 100


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
        return cls(machine.facts(), machine.versions(), machine.load())


@dataclass
class Target:
    """`reached` is None where the run did not measure it."""

    text: str
    limit: str
    found: str
    reached: bool | None


def console() -> Console:
    """For standard output; of a fixed width where that is no terminal."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = _WIDTH
    return made


def header(name: str, facts: Facts, *lines: str) -> Text:
    """Benchmark, date, load; machine; versions; what else belongs above a table."""
    found = facts.machine
    kind = "virtual machine" if found["virtual_machine"] == "yes" else "no virtual machine"
    load = " to ".join(" ".join(map(str, load)) for load in (facts.load_at_start, facts.load_at_end))
    cores, memory, kernel = found["physical_cores_allowed"], found["memory_gib"], found["kernel"]
    above = (
        f"  {facts.date}  load {load}",
        f"{found['cpu']}, {cores} cores, {memory} GiB, {kind}, Linux {kernel}",
        ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        *lines,
    )
    return Text.assemble((name, "bold"), "\n".join(above))


def about(docstring: str | None) -> str:
    """What a module says of itself, after its first sentence, as paragraphs of one line each."""
    _, *paragraphs = (docstring or "").strip().split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def show(console: Console, title: str, shown: Table) -> None:
    console.print(f"\n{title}", style="bold")
    console.print(shown)


def table(texts: Sequence[str] = (), numbers: Sequence[str] = ()) -> Table:
    """Columns of text on the left, then columns of numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in texts:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def targets(found: Sequence[Target]) -> Table:
    """One line for each target."""
    made = table()
    for name in ("target", "limit", "found", ""):
        made.add_column(name, justify="right" if name == "limit" else "left")
    for target in found:
        verdict = {True: Text("reached", "green"), False: Text("missed", "bold red"), None: Text("-")}
        made.add_row(target.text, target.limit, target.found, verdict[target.reached])
    return made


def write_json(
    path: Path, name: str, facts: Mapping[str, Any], figures: Mapping[str, Any], aims: Sequence[Target]
) -> None:
    """Every figure of a run in one file."""
    tree = {"benchmark": name, **facts, **figures, "targets": [asdict(target) for target in aims]}
    path.write_text(json.dumps(tree, indent=1) + "\n")


def progress(text: str) -> None:
    """On a terminal only; each takes the place of the one before."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
