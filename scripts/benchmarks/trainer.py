"""How much of the teacher's time HuggingFace's Trainer hides: simulated devices, the real launcher, bridge and DistillationTrainer.

For a micro-batch the teacher's device takes t, and the student's takes s: a third for its forward, then the reply is needed, then
two thirds for the backward. Two ranks train a small model under DDP on CPUs. A step with k micro-batches is ideal at k max(t, s).

Trainer has costs of its own, which a GPU would partly hide: the optimizer, the all-reduce, its bookkeeping. The rows without a
teacher are plain Trainer. `x host` is the step against the larger of k t and the step of plain Trainer. The first step of an
epoch has nothing ahead of it and is apart: `first` is how much longer it takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from benchmarks import machine, tables
from benchmarks.tables import Facts, Target

LIMIT = 1.05
SCRIPTS = Path(__file__).parents[1]


class Case(NamedTuple):
    """Times in milliseconds; depth 0 is Trainer without a teacher."""

    depth: int
    accumulation: int
    teacher_ms: int
    student_ms: int

    @property
    def ideal_s(self) -> float:
        return self.accumulation * max(self.teacher_ms, self.student_ms) / 1000


@dataclass
class Results:
    facts: Facts
    turns: dict[Case, tuple[list[float], float]] = field(default_factory=dict)
    """The steps but the first of an epoch, and how much longer that one takes; in seconds, of rank 0."""

    def step_s(self, case: Case) -> float:
        return statistics.median(self.turns[case][0])

    def of_host(self, case: Case) -> float:
        """The step against what Trainer takes without a teacher, or the teacher alone."""
        plain = self.step_s(case._replace(depth=0, teacher_ms=0))
        return self.step_s(case) / max(plain, case.accumulation * case.teacher_ms / 1000)

    def targets(self) -> list[Target]:
        found = {case: self.step_s(case) / case.ideal_s for case in self.turns if case.depth}
        worst = max(found, key=lambda case: found[case])
        text = f"{found[worst]:.3f} (depth {worst.depth}, k {worst.accumulation}, t {worst.teacher_ms} ms)"
        return [Target("the step / k max(t, s): the worst", f"{LIMIT}", text, found[worst] <= LIMIT)]


def run(options: argparse.Namespace) -> int:
    """Measure every case, print the table, write the JSON. 1 where a run failed."""
    if options.quick:
        options.student_ms, options.micro_batches, options.depths = 20, 8, options.depths[:1]
    s = options.student_ms
    results = Results(Facts.now())
    for depth in options.depths:
        times = [round(multiple * s) for multiple in options.multiples]
        cases = [Case(depth, k, t, s) for k in options.accumulation for t in times]
        if depth == options.depths[0]:
            cases = [Case(0, k, 0, s) for k in options.accumulation] + cases
        tables.progress(f"ring.depth={depth}")
        if not _measure(depth, cases, options, results):
            return 1
    tables.progress("")
    results.facts.load_at_end = machine.load()
    console = tables.console()
    setting = f"2 ranks, s = {s} ms, 2 epochs of {options.micro_batches} micro-batches in each case"
    console.print(tables.header("trainer", results.facts, setting))
    console.print(tables.about(__doc__), style="dim")
    tables.show(console, "the step of DistillationTrainer, by ring.depth", _table(results))
    tables.show(console, "targets", tables.targets(results.targets()))
    if options.json:
        figures = [
            {**case._asdict(), "steps_s": steps, "first_s": first} for case, (steps, first) in results.turns.items()
        ]
        tables.write_json(options.json, "trainer", asdict(results.facts), {"cases": figures}, results.targets())
    return 0


def _measure(depth: int, cases: list[Case], options: argparse.Namespace, results: Results) -> bool:
    """All cases of a depth in one run under the launcher; what it printed, where it failed."""
    told = [
        {
            "teacher_ms": case.teacher_ms,
            "student_ms": case.student_ms,
            "accumulation": case.accumulation,
            "steps": options.micro_batches // case.accumulation,
            "distils": bool(case.depth),
        }
        for case in cases
    ]
    with tempfile.TemporaryDirectory() as out:
        settings = ["payload.logits={dtype: float32}", f"ring.depth={depth}", "ring.max_tokens=8", "log.stats_every=0"]
        settings.append(f"timeouts.request_s={options.patience}")
        launch = [sys.executable, "-m", "shmbridge.launch", "--cpu", "2", "--teacher", "benchmarks.trainee:build"]
        script = ["--run-dir", out, *settings, "--", "-m", "benchmarks.trainee", out, json.dumps(told)]
        done = subprocess.run([*launch, *script], cwd=SCRIPTS, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"failed: {done.stdout}{done.stderr}")
            return False
        turns = json.loads((Path(out) / "rank-0.json").read_text())
    results.turns |= {case: (steps, first) for case, (steps, first) in zip(cases, turns, strict=True)}
    return True


def _table(results: Results) -> Table:
    table = tables.table(("depth",), ("k", "t", "ideal", "step", "low to high", "x ideal", "x host", "first"))
    for case, (steps, first) in sorted(results.turns.items()):
        step = results.step_s(case)
        table.add_row(
            str(case.depth) if case.depth else "no teacher",
            str(case.accumulation),
            f"{case.teacher_ms} ms" if case.depth else "",
            f"{1000 * case.ideal_s:.0f} ms",
            f"{1000 * step:.1f} ms",
            f"{1000 * min(steps):.1f} to {1000 * max(steps):.1f}",
            f"{step / case.ideal_s:.3f}",
            f"{results.of_host(case):.3f}" if case.depth else "",
            f"+{1000 * first:.1f} ms",
        )
    return table
