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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from rich.table import Table

from benchmarks import machine, tables
from benchmarks.group import TOKENS, Order, Sample, alive, median
from benchmarks.processes import Failed
from benchmarks.tables import Facts, Target

LIMIT = 0.95
WAYS = {"exchange": "exchange", "free": "exchange", "prefetch": "prefetch"}
WARM = 2


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


@dataclass
class Results:
    """Everything that a run measured."""

    facts: Facts
    steps: int
    us_per_token: float
    samples: dict[Case, list[Sample]] = field(default_factory=dict)

    def of(self, case: Case) -> Sample:
        return median(self.samples[case])

    def tokens_per_s(self, case: Case) -> float:
        return case.ranks * TOKENS / self.of(case).step_s

    def gain(self, case: Case) -> float:
        """Times the throughput of one replica."""
        return self.tokens_per_s(case) / self.tokens_per_s(case._replace(replicas=1))

    @property
    def replies(self) -> int:
        return sum(one.replies for samples in self.samples.values() for one in samples)

    def targets(self) -> list[Target]:
        ways = dict.fromkeys(case.way for case in self.samples)
        several = [case for case in self.samples if case.replicas > 1]
        kinds = [(way, even) for even in (True, False) for way in ways]
        groups = [[case for case in several if (case.way, case.even) == kind] for kind in kinds]
        return [self._target(*kind, cases) for kind, cases in zip(kinds, groups, strict=True) if cases]

    def _target(self, way: str, even: bool, cases: Sequence[Case]) -> Target:
        found = [self.gain(case) / case.best for case in cases]
        told = "  ".join(f"{x:.3f} (N = {case.replicas})" for x, case in zip(found, cases, strict=True))
        text = f"{way}, lanes even: throughput / N x one" if even else f"{way}, lanes uneven: throughput / best"
        return Target(text, f"{LIMIT}", told, min(found) >= LIMIT)


def run(options: argparse.Namespace) -> int:
    """Measure every case, print the table, write the JSON. 1 where the bridge failed."""
    if options.quick:
        options.ranks, options.replicas, options.us_per_token, options.steps, options.repeats = [4, 3], [1, 2], 5, 3, 1
    options.replicas = sorted({1, *options.replicas})
    cases = _cases(options.ranks, ("exchange", "free", "prefetch"), options.replicas)
    results = Results(Facts.now(), options.steps, options.us_per_token, {case: [] for case in cases})
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
        top = {"steps": results.steps, "us_per_token": results.us_per_token, "cases": figures}
        tables.write_json(options.json, "replicas", asdict(results.facts), top, results.targets())
    return 0


def _cases(ranks: Sequence[int], ways: Sequence[str], replicas: Sequence[int]) -> list[Case]:
    """Without what the ranks that are done first would bend: uneven lanes, and nobody waits."""
    cases = [Case(*case) for case in itertools.product(ranks, ways, replicas)]
    return [case for case in cases if case.replicas <= case.ranks and (case.even or case.way != "free")]


def _measure(cases: Sequence[Case], options: argparse.Namespace, results: Results) -> None:
    with alive(options.patience) as start:
        kinds = dict.fromkeys((case.ranks, case.replicas) for case in cases)
        groups = {kind: start(*kind, [f"teacher.max_batch_tokens={TOKENS * kind[0]}"]) for kind in kinds}
        for turn in range(options.repeats):
            first = turn * len(cases) // options.repeats
            for number, case in enumerate([*cases[first:], *cases[:first]], 1):
                tables.progress(f"[{turn + 1}/{options.repeats}, {number}/{len(cases)}] {case}")
                order = Order(WAYS[case.way], 0.0, WARM, options.steps, meets=case.way != "free")
                group = groups[case.ranks, case.replicas]
                results.samples[case].append(group.turn(order, per_token_s=options.us_per_token / 1e6))
    tables.progress("")


def _show(results: Results, options: argparse.Namespace) -> None:
    console = tables.console()
    setting = f"{results.us_per_token:g} us of device for each token; {options.repeats} x {results.steps} steps of each case, {WARM} before them"
    console.print(tables.header("replicas", results.facts, setting))
    console.print(tables.about(__doc__), style="dim")
    tables.show(console, "throughput of the whole group", _throughput(results))
    console.print(
        "N: replicas. lanes: of each. x one: against one replica, the same ranks and way. best: what the lanes allow. "
        "fwd: forwards of each replica in one step. busy: share of the step in which the busiest replica's device works. "
        "CPU: percent of a core, all processes of a kind together.",
        style="dim",
    )
    console.print(f"{results.replies} of {results.replies} replies are the answer to their request")
    tables.show(console, "targets", tables.targets(results.targets()))


def _throughput(results: Results) -> Table:
    table = tables.table((), ("ranks",))
    table.add_column("way", no_wrap=True)
    numbers = ("N", "lanes", "tokens/s", "x one", "best", "of best", "fwd", "busy", "CPU: teachers", "ranks")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    before: tuple[int, str] | None = None
    for case in results.samples:
        section = case.ranks, case.way
        if before is not None and section != before:
            table.add_section()
        where = [str(case.ranks), case.way] if section != before else ["", ""]
        table.add_row(*where, *_cells(results, case))
        before = section
    return table


def _cells(results: Results, case: Case) -> list[str]:
    found, gain = results.of(case), results.gain(case)
    return [
        str(case.replicas),
        "+".join(map(str, case.lanes)),
        f"{results.tokens_per_s(case):,.0f}",
        f"{gain:.2f}",
        f"{case.best:.2f}",
        f"{gain / case.best:.3f}",
        f"{found.forwards / case.replicas:.2f}",
        f"{100 * found.busy:.1f} %",
        f"{100 * found.teacher_cpu:.1f} %",
        f"{100 * found.ranks_cpu:.1f} %",
    ]
