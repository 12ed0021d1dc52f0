"""How much of the teacher's time a training step hides: simulated devices, the real bridge.

A forward of the teacher takes t, whatever the batch; a step of a rank takes s on its own device: a third for the student's
forward, then the reply is needed, then two thirds for loss and backward. 1024 token IDs go out and 64 KB come back for each
rank and step. At the end of a step the ranks meet, as a data-parallel group does in its all-reduce: a barrier of a few
semaphores, which is part of the step. Devices sleep to an absolute deadline, set when the work begins; what a sleep
oversleeps, the barrier, and every wait for a core are in the figures, and the step without a teacher shows how much that is.

Ideal is max(t, s). `exchange` asks and waits before the step, `submit` asks at its begin and waits where the reply is needed,
`prefetch` has asked one step before. The teacher collects greedily, but for the rows with `lockstep` (teacher.collect). Each
figure is the median of several turns; all cases take turns, in rounds that begin with another one each time. Every reply is
compared with its request.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from rich.table import Table

from benchmarks import machine, tables
from benchmarks.group import FORWARD_SHARE, Order, Sample, alive, median
from benchmarks.processes import Failed
from benchmarks.tables import Facts, Target

LIMIT = 1.03
WARM = 3


class Case(NamedTuple):
    """What one turn measures; times in seconds."""

    way: str
    collect: str
    teacher_s: float
    student_s: float
    apart_s: float = 0.0

    @property
    def told(self) -> str:
        """The way, as a table calls it."""
        return "no teacher" if self.way == "alone" else self.way + " lockstep" * (self.collect == "lockstep")

    @property
    def ideal_s(self) -> float:
        return max(self.teacher_s, self.student_s)

    @property
    def sum_s(self) -> float:
        """What t and s add up to in this way of asking."""
        forward = FORWARD_SHARE * self.student_s
        ways = {
            "alone": self.student_s,
            "exchange": self.teacher_s + self.student_s,
            "submit": max(self.teacher_s, forward) + self.student_s - forward,
            "prefetch": self.ideal_s,
        }
        return ways[self.way]


@dataclass
class Results:
    """Everything that a run measured."""

    facts: Facts
    ranks: int
    steps: int
    samples: dict[Case, list[Sample]] = field(default_factory=dict)

    def of(self, case: Case) -> Sample:
        return median(self.samples[case])

    @property
    def replies(self) -> int:
        return sum(one.replies for samples in self.samples.values() for one in samples)

    def apart(self, case: Case) -> Sample:
        """What a group whose ranks come as far apart takes without a teacher."""
        return self.of(case._replace(way="alone", collect="greedy", teacher_s=0.0))

    def targets(self) -> list[Target]:
        return [
            self._target("prefetch, t up to s: step / s, by t", [t for t in self._times() if t <= self._student_s]),
            self._target("prefetch, t above s: step / t, by t", [t for t in self._times() if t > self._student_s]),
        ]

    def _target(self, text: str, times: Sequence[float]) -> Target:
        cases = [Case("prefetch", "greedy", t, self._student_s) for t in times]
        found = [self.of(case).step_s / case.ideal_s for case in cases]
        told = "  ".join(f"{x:.3f} ({_ms(case.teacher_s)})" for x, case in zip(found, cases, strict=True))
        return Target(text, f"{LIMIT}", told or "not measured", max(found) <= LIMIT if found else None)

    @property
    def _student_s(self) -> float:
        return next(iter(self.samples)).student_s

    def _times(self) -> list[float]:
        return sorted({case.teacher_s for case in self.samples if case.teacher_s and not case.apart_s})


def run(options: argparse.Namespace) -> int:
    """Measure every case, print the tables, write the JSON. 1 where the bridge failed."""
    if options.quick:
        options.ranks, options.student_ms, options.steps, options.repeats = 3, 10.0, 3, 1
        options.multiples, options.apart = options.multiples[:1], options.apart[:1]
    cases = _cases(options)
    results = Results(Facts.now(), options.ranks, options.steps, {case: [] for case in cases})
    try:
        _measure(cases, options, results)
    except Failed as error:
        print(f"failed: {error}")
        return 1
    results.facts.load_at_end = machine.load()
    _show(results, options)
    if options.json:
        figures = [
            {**case._asdict(), "turns": [one._asdict() for one in turns]} for case, turns in results.samples.items()
        ]
        top = {"ranks": results.ranks, "steps": results.steps, "cases": figures}
        tables.write_json(options.json, "overlap", asdict(results.facts), top, results.targets())
    return 0


def _cases(options: argparse.Namespace) -> list[Case]:
    """In the order of the tables."""
    s = options.student_ms / 1000
    cases = [Case("alone", "greedy", 0.0, s)]
    for multiple in options.multiples:
        cases += [Case(way, "greedy", multiple * s, s) for way in ("exchange", "submit", "prefetch")]
        cases.append(Case("prefetch", "lockstep", multiple * s, s))
    for share in options.apart:
        cases += [
            Case("alone", "greedy", 0.0, s, share * s),
            Case("prefetch", "greedy", s, s, share * s),
            Case("prefetch", "lockstep", s, s, share * s),
        ]
    return cases


def _measure(cases: Sequence[Case], options: argparse.Namespace, results: Results) -> None:
    with alive(options.patience) as start:
        groups = {
            collect: start(options.ranks, 1, [f"teacher.collect={collect}"]) for collect in ("greedy", "lockstep")
        }
        for turn in range(options.repeats):
            first = turn * len(cases) // options.repeats
            for number, case in enumerate([*cases[first:], *cases[:first]], 1):
                tables.progress(f"[{turn + 1}/{options.repeats}, {number}/{len(cases)}] {case.way} {case.collect}")
                order = Order(case.way, case.student_s, WARM, options.steps, apart_s=case.apart_s)
                results.samples[case].append(groups[case.collect].turn(order, case.teacher_s))
    tables.progress("")


def _show(results: Results, options: argparse.Namespace) -> None:
    console = tables.console()
    s = options.student_ms / 1000
    alone = results.of(Case("alone", "greedy", 0.0, s))
    setting = (
        f"{results.ranks} ranks, 1 teacher, s = {_ms(s)}; {options.repeats} x {results.steps} steps of each case, "
        f"{WARM} before them"
    )
    console.print(tables.header("overlap", results.facts, setting))
    console.print(tables.about(__doc__), style="dim")
    tables.show(console, "the step, by the teacher's time t", _steps(results))
    tables.show(console, "ranks that ask up to so much apart, at t = s", _apart(results))
    console.print(
        f"Without a teacher the step takes {_ms(alone.step_s)}, {alone.step_s / s:.3f}x. sum: what t and s add up to in this "
        "way of asking. x ideal: against max(t, s); in the second table against the same ranks without a teacher. "
        "low to high: of the turns. fwd: forwards of the teacher in one step. CPU: percent of a core; the ranks' of all together.",
        style="dim",
    )
    console.print(f"{results.replies} of {results.replies} replies are the answer to their request")
    tables.show(console, "targets", tables.targets(results.targets()))


_NUMBERS = ("step", "low to high", "x ideal", "fwd", "CPU: teacher", "ranks")


def _steps(results: Results) -> Table:
    table = tables.table(("t",), ())
    table.columns[0].justify = "right"
    _add_columns(table, ("way",), ("sum", *_NUMBERS))
    before = None
    for case in results.samples:
        if case.apart_s:
            continue
        if before is not None and case.teacher_s != before:
            table.add_section()
        told = _ms(case.teacher_s) if case.teacher_s else "none"
        table.add_row(
            told if case.teacher_s != before else "", case.told, _ms(case.sum_s), *_cells(results, case, case.ideal_s)
        )
        before = case.teacher_s
    return table


def _apart(results: Results) -> Table:
    table = tables.table((), ("apart",))
    _add_columns(table, ("way",), _NUMBERS)
    before = None
    for case in results.samples:
        if not case.apart_s:
            continue
        if before is not None and case.apart_s != before:
            table.add_section()
        ideal_s = results.apart(case).step_s
        table.add_row(_ms(case.apart_s) if case.apart_s != before else "", case.told, *_cells(results, case, ideal_s))
        before = case.apart_s
    return table


def _add_columns(table: Table, texts: Sequence[str], numbers: Sequence[str]) -> None:
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)


def _cells(results: Results, case: Case, ideal_s: float) -> list[str]:
    found = results.of(case)
    times = [one.step_s for one in results.samples[case]]
    span = f"{1000 * min(times):.1f} to {1000 * max(times):.1f}"
    steps = [f"{1000 * found.step_s:.1f} ms", span, f"{found.step_s / ideal_s:.3f}"]
    teacher = [f"{found.forwards:.2f}", f"{100 * found.teacher_cpu:.1f} %"] if found.forwards else ["", ""]
    return [*steps, *teacher, f"{100 * found.ranks_cpu:.1f} %"]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if round(1e4 * seconds) % 10 else f"{1000 * seconds:.0f} ms"
