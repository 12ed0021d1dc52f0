"""What more teacher replicas bring: N processes, lane i served by replica i % N, simulated devices, the real bridge.

A forward of a teacher takes a time proportional to its tokens; the students do nothing, so the teachers are what is waited
for. 1024 token IDs go out and 64 KB come back for each rank and step, and the ranks meet after each step, as a data-parallel
group does, so a step takes as long as the slowest replica: with ranks that do not divide evenly, N times one replica's
throughput cannot be had, and `best` says what can. Devices sleep to an absolute deadline, set when the work begins; what a
sleep oversleeps, the meeting, and every wait for a core are in the figures.

`exchange` asks and waits, so the teachers pause while the ranks read and ask again; `free` is the same, and no rank waits for
another; `prefetch` has asked one step before. Each figure is the median of several turns; all cases take turns, in rounds that begin with another one each time. Every
reply is compared with its request.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks import tables
from benchmarks.group import TOKENS, Order, Sample, figures, measure, median, replies_text, turns_text
from benchmarks.tables import Target

LIMIT = 0.95
WARM = 2
WAYS = {"exchange": "exchange", "free": "exchange", "prefetch": "prefetch"}  # how a rank asks
QUICK = {"ranks": [4, 3], "replicas": [1, 2], "us_per_token": 5.0, "steps": 3, "repeats": 1}


class Case(NamedTuple):
    """What one turn measures."""

    ranks: int
    way: str
    replicas: int

    @property
    def lanes(self) -> list[int]:
        """Of each replica."""
        return [len(range(replica, self.ranks, self.replicas)) for replica in range(self.replicas)]

    @property
    def best(self) -> float:
        """Times one replica's throughput, when a step takes as long as the replica with the most lanes."""
        return self.ranks / max(self.lanes)

    @property
    def even(self) -> bool:
        return self.best == self.replicas


def run(options: argparse.Namespace) -> int:
    """Measure every case, print the table, write the JSON. Raises Failed."""
    facts = tables.Facts.now()
    plans = {
        case: (
            (case.ranks, case.replicas, f"teacher.max_batch_tokens={TOKENS * case.ranks}"),
            Order(WAYS[case.way], WARM, options.steps, token_s=options.us_per_token / 1e6, meets=case.way != "free"),
        )
        for case in _cases(options.ranks, sorted({1, *options.replicas}))
    }
    samples = measure(plans, options.repeats, options.patience)
    found = {case: median(turns) for case, turns in samples.items()}
    one_s = {(case.ranks, case.way): each.step_s for case, each in found.items() if case.replicas == 1}
    gains = {case: one_s[case.ranks, case.way] / each.step_s for case, each in found.items()}
    numbers = ("N", "lanes", "tokens/s", "x one", "best", "of best", "fwd", "busy", "CPU: teachers", "ranks")
    rows = [_cells(case, each, gains[case]) for case, each in found.items()]
    throughput = tables.table(("way",), numbers, keys=("ranks",), rows=rows, grouped=2)
    tables.report(
        "replicas",
        __doc__,
        facts,
        settings=[f"{options.us_per_token:g} us of device for each token; {turns_text(options, WARM)}"],
        shown=[
            ("throughput of the whole group", throughput),
            "N: replicas. lanes: of each. x one: against one replica, the same ranks and way. best: what the lanes allow. fwd: "
            "forwards of each replica in one step. busy: share of the step in which the busiest replica's device works. CPU: "
            "percent of a core, all processes of a kind together.",
            replies_text(found.values()),
        ],
        targets=list(_targets(gains)),
        figures={"steps": options.steps, "us_per_token": options.us_per_token, "cases": figures(samples)},
        path=options.json,
    )
    return 0


def _cases(ranks: Sequence[int], replicas: Sequence[int]) -> list[Case]:
    """Nobody runs freely where the lanes are uneven: the ranks that are done first would bend the figures."""
    cases = [Case(*case) for case in itertools.product(ranks, WAYS, replicas)]
    return [case for case in cases if case.replicas <= case.ranks and (case.even or case.way != "free")]


def _targets(gains: Mapping[Case, float]) -> Iterator[Target]:
    for even, way in itertools.product((True, False), WAYS):
        found = {
            case: gain / case.best
            for case, gain in gains.items()
            if case.replicas > 1 and (case.even, case.way) == (even, way)
        }
        if found:
            told = "  ".join(f"{x:.3f} (N = {case.replicas})" for case, x in found.items())
            text = f"{way}, lanes even: throughput / N x one" if even else f"{way}, lanes uneven: throughput / best"
            yield Target(text, f"{LIMIT}", told, min(found.values()) >= LIMIT)


def _cells(case: Case, found: Sample, gain: float) -> tuple[str, ...]:
    return (
        str(case.ranks),
        case.way,
        str(case.replicas),
        "+".join(map(str, case.lanes)),
        f"{case.ranks * TOKENS / found.step_s:,.0f}",
        f"{gain:.2f}",
        f"{case.best:.2f}",
        f"{gain / case.best:.3f}",
        f"{found.forwards / case.replicas:.2f}",
        f"{100 * found.busy:.1f} %",
        f"{100 * found.teacher_cpu:.1f} %",
        f"{100 * found.ranks_cpu:.1f} %",
    )
