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
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import tables
from benchmarks.group import FORWARD_SHARE, Order, Sample, figures, measure, median, replies_text, turns_text
from benchmarks.tables import Target

LIMIT = 1.03
WARM = 3
QUICK = {"ranks": 3, "student_ms": 10.0, "steps": 3, "repeats": 1, "multiples": [0.25], "apart": [0.05]}


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
        forward_s = FORWARD_SHARE * self.student_s
        ways = {
            "alone": self.student_s,
            "exchange": self.teacher_s + self.student_s,
            "submit": max(self.teacher_s, forward_s) + self.student_s - forward_s,
            "prefetch": self.ideal_s,
        }
        return ways[self.way]


def run(options: argparse.Namespace) -> int:
    """Measure every case, print the tables, write the JSON. Raises Failed."""
    facts, s = tables.Facts.now(), options.student_ms / 1000
    plans = {
        case: (
            (options.ranks, 1, f"teacher.collect={case.collect}"),
            Order(case.way, WARM, options.steps, s, forward_s=case.teacher_s, apart_s=case.apart_s),
        )
        for case in _cases(s, options.multiples, options.apart)
    }
    samples = measure(plans, options.repeats, options.patience)
    found = {case: median(turns) for case, turns in samples.items()}
    step_s = {case: each.step_s for case, each in found.items()}
    alone_s = {case.apart_s: step_s[case] for case in found if case.way == "alone"}
    steps = [
        (_ms(case.teacher_s) if case.teacher_s else "none", case.told, _ms(case.sum_s), *_cells(turns, case.ideal_s))
        for case, turns in samples.items()
        if not case.apart_s
    ]
    apart = [
        (_ms(case.apart_s), case.told, *_cells(turns, alone_s[case.apart_s]))
        for case, turns in samples.items()
        if case.apart_s
    ]
    numbers = ("step", "low to high", "x ideal", "fwd", "CPU: teacher", "ranks")
    steps_table = tables.table(("way",), ("sum", *numbers), keys=("t",), rows=steps, grouped=1)
    apart_table = tables.table(("way",), numbers, keys=("apart",), rows=apart, grouped=1)
    tables.report(
        "overlap",
        __doc__,
        facts,
        settings=[f"{options.ranks} ranks, 1 teacher, s = {_ms(s)}; {turns_text(options, WARM)}"],
        shown=[
            ("the step, by the teacher's time t", steps_table),
            ("ranks that ask up to so much apart, at t = s", apart_table),
            f"Without a teacher the step takes {_ms(alone_s[0])}, {alone_s[0] / s:.3f}x. sum: what t and s add up to in this way "
            "of asking. x ideal: against max(t, s); in the second table against the same ranks without a teacher. low to high: "
            "of the turns. fwd: forwards of the teacher in one step. CPU: percent of a core; the ranks' of all together.",
            replies_text(found.values()),
        ],
        targets=_targets(step_s, s),
        figures={"ranks": options.ranks, "steps": options.steps, "cases": figures(samples)},
        path=options.json,
    )
    return 0


def _cases(s: float, multiples: Sequence[float], apart: Sequence[float]) -> list[Case]:
    """In the order of the tables."""
    cases = [Case("alone", "greedy", 0.0, s)]
    for multiple in multiples:
        cases += [Case(way, "greedy", multiple * s, s) for way in ("exchange", "submit", "prefetch")]
        cases.append(Case("prefetch", "lockstep", multiple * s, s))
    for share in apart:
        cases.append(Case("alone", "greedy", 0.0, s, share * s))
        cases += [Case("prefetch", collect, s, s, share * s) for collect in ("greedy", "lockstep")]
    return cases


def _targets(step_s: Mapping[Case, float], s: float) -> list[Target]:
    """The step of a prefetch, apart for teachers that are faster than the student and for those that are slower."""
    judged = [case for case in step_s if case[:2] == ("prefetch", "greedy") and not case.apart_s]
    kinds = {
        "prefetch, t up to s: step / s, by t": [case for case in judged if case.teacher_s <= s],
        "prefetch, t above s: step / t, by t": [case for case in judged if case.teacher_s > s],
    }
    made = []
    for text, cases in kinds.items():
        found = {case: step_s[case] / case.ideal_s for case in sorted(cases)}
        told = "  ".join(f"{x:.3f} ({_ms(case.teacher_s)})" for case, x in found.items())
        made.append(Target(text, f"{LIMIT}", told or "not measured", max(found.values()) <= LIMIT if found else None))
    return made


def _cells(turns: Sequence[Sample], ideal_s: float) -> list[str]:
    found, times = median(turns), [1000 * turn.step_s for turn in turns]
    steps = [f"{1000 * found.step_s:.1f} ms", f"{min(times):.1f} to {max(times):.1f}", f"{found.step_s / ideal_s:.3f}"]
    teacher = [f"{found.forwards:.2f}", f"{100 * found.teacher_cpu:.1f} %"] if found.forwards else ["", ""]
    return [*steps, *teacher, f"{100 * found.ranks_cpu:.1f} %"]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if round(1e4 * seconds) % 10 else f"{1000 * seconds:.0f} ms"
