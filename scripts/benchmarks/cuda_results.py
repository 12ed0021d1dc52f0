"""The figures of `bench.py cuda`, what they say about the targets, and their tables. No GPU is needed to show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.table import Table

from benchmarks import tables
from benchmarks.tables import Target, size_text

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


@dataclass
class Reading:
    """A kernel that reads a reply `passes` times: seconds from its arrival to the last pass, for each cuda.read."""

    nbytes: int
    passes: int
    copy_s: float
    in_place_s: float


@dataclass
class Step:
    """Training steps; seconds of one."""

    alone_s: float
    bridge_s: float
    together_s: float  # teacher and student in one process, one after the other


@dataclass
class Results:
    """Everything that a run measured."""

    copies: list[Copy] = field(default_factory=list)
    calls: Calls | None = None
    readings: list[Reading] = field(default_factory=list)
    step: Step | None = None

    def targets(self) -> list[Target]:
        """Of the copies the largest is judged, where launching no longer counts."""
        copy = Target("copy of a reply: bandwidth / plain copy in one process", f"{COPY_SHARE:g}", "not measured", None)
        cpu = Target("CPU time of submit + wait + release", f"{CPU_US:g} us", "not measured", None)
        if self.copies:
            largest = max(self.copies, key=lambda copy: copy.nbytes)
            copy.found, copy.reached = f"{largest.share:.3f} ({size_text(largest.nbytes)})", largest.share >= COPY_SHARE
        if self.calls:
            cpu.found, cpu.reached = f"{self.calls.cpu_us:.1f} us", self.calls.cpu_us < CPU_US
        return [copy, cpu]

    def shown(self) -> Iterator[tuple[str, Table]]:
        """Tables with their titles, of what was measured."""
        if self.copies:
            rows = [
                (
                    size_text(each.nbytes),
                    _rate(each.nbytes, each.reply_s),
                    _rate(each.nbytes, each.plain_s),
                    f"{each.share:.3f}",
                )
                for each in self.copies
            ]
            numbers = ("reply", "from the teacher", "plain copy", "share")
            yield "copying a reply out of the teacher's memory", tables.table((), numbers, rows=rows)
        if self.calls:
            calls = self.calls
            times = (calls.bridge_us, calls.call_us, calls.bridge_us - calls.call_us, calls.cpu_us)
            numbers = ("over the bridge", "in one process", "added", "CPU of the rank")
            yield "a small reply", tables.table((), numbers, rows=[[f"{us:.1f} us" for us in times]])
        if self.readings:
            rows = [
                (
                    *(size_text(each.nbytes), str(each.passes)),
                    *(f"{1e6 * seconds:.0f} us" for seconds in (each.copy_s, each.in_place_s)),
                    "copy" if each.copy_s < each.in_place_s else "in_place",
                )
                for each in self.readings
            ]
            numbers = ("reply", "passes", "copy", "in_place", "faster")
            yield "cuda.read: when which is faster", tables.table((), numbers, rows=rows)
        if self.step:
            arms = {
                "without a teacher": self.step.alone_s,
                "with the teacher over the bridge": self.step.bridge_s,
                "with the teacher in one process": self.step.together_s,
            }
            rows = [
                (name, f"{1000 * seconds:.2f} ms", f"{seconds / self.step.alone_s:.2f}")
                for name, seconds in arms.items()
            ]
            yield "a training step", tables.table(("",), ("step", "x alone"), rows=rows)


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / seconds / 1e9:.0f} GB/s"
