"""The figures of `bench.py cuda`, what they say about the targets, and their tables. No GPU is needed to show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from benchmarks import tables
from benchmarks.cell import size_text
from benchmarks.tables import Facts, Target

COPY_SHARE = 0.97  # of the bandwidth of a plain copy
CPU_US = 30.0


@dataclass
class Copy:
    """One size of reply: seconds of a copy out of the teacher's memory, and of a plain one in one process."""

    nbytes: int
    reply_s: float
    plain_s: float

    @property
    def share(self) -> float:
        return self.plain_s / self.reply_s


@dataclass
class Calls:
    """A small reply; microseconds, medians but for the CPU's, which is the mean."""

    cpu_us: float  # of submit, wait and release, of the rank's thread
    bridge_us: float  # from submit until the reply is there on the GPU
    call_us: float  # the same forward, in one process

    @property
    def added_us(self) -> float:
        return self.bridge_us - self.call_us


@dataclass
class Reading:
    """A kernel that reads a reply `passes` times: seconds from its arrival to the last pass."""

    nbytes: int
    passes: int
    copy_s: float
    in_place_s: float

    @property
    def faster(self) -> str:
        return "copy" if self.copy_s < self.in_place_s else "in_place"


@dataclass
class Step:
    """Training steps; seconds of one."""

    alone_s: float
    bridge_s: float
    together_s: float  # teacher and student in one process, one after the other


@dataclass
class Results:
    """Everything that a run measured."""

    facts: Facts
    gpus: dict[str, str]  # teacher's and rank's card, driver, CUDA
    copies: list[Copy] = field(default_factory=list)
    calls: Calls | None = None
    readings: list[Reading] = field(default_factory=list)
    step: Step | None = None

    def targets(self) -> list[Target]:
        return [self._copy(), self._cpu()]

    def _copy(self) -> Target:
        """The largest is meant: where launching no longer counts."""
        text = "copy of a reply: bandwidth / plain copy in one process"
        if not self.copies:
            return Target(text, f"{COPY_SHARE:g}", "not measured", None)
        largest = max(self.copies, key=lambda copy: copy.nbytes)
        found = f"{largest.share:.3f} ({size_text(largest.nbytes)})"
        return Target(text, f"{COPY_SHARE:g}", found, largest.share >= COPY_SHARE)

    def _cpu(self) -> Target:
        text = "CPU time of submit + wait + release"
        if self.calls is None:
            return Target(text, f"{CPU_US:g} us", "not measured", None)
        return Target(text, f"{CPU_US:g} us", f"{self.calls.cpu_us:.1f} us", self.calls.cpu_us < CPU_US)


def missed(found: Sequence[Target]) -> bool:
    """Whether a target was not reached, or not measured."""
    return not all(target.reached for target in found)


def show(results: Results, about: str | None) -> None:
    """Print everything."""
    console = tables.console()
    console.print(tables.header("cuda", results.facts, ", ".join(f"{k} {v}" for k, v in results.gpus.items())))
    console.print(tables.about(about), style="dim")
    for title, shown in shown_tables(results):
        tables.show(console, title, shown)
    tables.show(console, "targets", tables.targets(results.targets()))


def shown_tables(results: Results) -> list[tuple[str, Table]]:
    """Each with its title; of what was measured."""
    found = [("copying a reply out of the teacher's memory", _copies(results.copies))] if results.copies else []
    if results.calls:
        found.append(("a small reply", _calls(results.calls)))
    if results.readings:
        found.append(("cuda.read: when which is faster", _readings(results.readings)))
    if results.step:
        found.append(("a training step", _step(results.step)))
    return found


def write_json(results: Results, path: Path) -> None:
    """Every figure, with the machine, the versions and the targets."""
    figures = asdict(results)
    tables.write_json(path, "cuda", figures.pop("facts"), figures, results.targets())


def _copies(copies: Sequence[Copy]) -> Table:
    made = tables.table((), ("reply", "from the teacher", "plain copy", "share"))
    for copy in copies:
        rates = (f"{copy.nbytes / seconds / 1e9:.0f} GB/s" for seconds in (copy.reply_s, copy.plain_s))
        made.add_row(size_text(copy.nbytes), *rates, f"{copy.share:.3f}")
    return made


def _calls(calls: Calls) -> Table:
    made = tables.table((), ("over the bridge", "in one process", "added", "CPU of the rank"))
    made.add_row(*(f"{us:.1f} us" for us in (calls.bridge_us, calls.call_us, calls.added_us, calls.cpu_us)))
    return made


def _readings(readings: Sequence[Reading]) -> Table:
    made = tables.table((), ("reply", "passes", "copy", "in_place"))
    made.add_column("faster")
    for one in readings:
        times = (f"{1e6 * seconds:.0f} us" for seconds in (one.copy_s, one.in_place_s))
        made.add_row(size_text(one.nbytes), str(one.passes), *times, one.faster)
    return made


def _step(step: Step) -> Table:
    made = tables.table(("",), ("step", "x alone"))
    rows = {
        "without a teacher": step.alone_s,
        "with the teacher over the bridge": step.bridge_s,
        "with the teacher in one process": step.together_s,
    }
    for name, seconds in rows.items():
        made.add_row(name, f"{1000 * seconds:.2f} ms", f"{seconds / step.alone_s:.2f}")
    return made
