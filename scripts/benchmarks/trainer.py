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
from pathlib import Path
from typing import NamedTuple

from benchmarks import tables
from benchmarks.processes import Failed
from benchmarks.tables import Target

LIMIT = 1.05
SCRIPTS = Path(__file__).parents[1]
QUICK = {"student_ms": 20, "micro_batches": 8, "depths": [1]}


class Case(NamedTuple):
    """Times in milliseconds; depth 0 is Trainer without a teacher."""

    depth: int
    accumulation: int
    teacher_ms: int
    student_ms: int

    @property
    def ideal_s(self) -> float:
        return self.accumulation * max(self.teacher_ms, self.student_ms) / 1000


class Turn(NamedTuple):
    """What rank 0 saw of a case, in seconds."""

    steps: list[float]
    """All but the first of each epoch."""
    first: float
    """The first step of an epoch takes so much longer, in the mean."""

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps)


def run(options: argparse.Namespace) -> int:
    """Measure every case, print the table, write the JSON. Raises Failed."""
    facts, s = tables.Facts.now(), options.student_ms
    times = [round(multiple * s) for multiple in options.multiples]
    turns: dict[Case, Turn] = {}
    for depth in options.depths:
        cases = [] if turns else [Case(0, k, 0, s) for k in options.accumulation]
        cases += [Case(depth, k, t, s) for k in options.accumulation for t in times]
        tables.progress(f"ring.depth={depth}")
        turns |= zip(cases, _measure(depth, cases, options), strict=True)
    numbers = ("k", "t", "ideal", "step", "low to high", "x ideal", "x host", "first")
    rows = [_cells(case, turn, turns) for case, turn in sorted(turns.items())]
    ratios = {case: turn.step_s / case.ideal_s for case, turn in turns.items() if case.depth}
    worst = max(ratios, key=lambda case: ratios[case])
    found = f"{ratios[worst]:.3f} (depth {worst.depth}, k {worst.accumulation}, t {worst.teacher_ms} ms)"
    tables.report(
        "trainer",
        __doc__,
        facts,
        settings=[f"2 ranks, s = {s} ms, 2 epochs of {options.micro_batches} micro-batches in each case"],
        shown=[("the step of DistillationTrainer, by ring.depth", tables.table(("depth",), numbers, rows=rows))],
        targets=[Target("the step / k max(t, s): the worst", f"{LIMIT}", found, ratios[worst] <= LIMIT)],
        figures={
            "cases": [{**case._asdict(), "steps_s": turn.steps, "first_s": turn.first} for case, turn in turns.items()]
        },
        path=options.json,
    )
    return 0


def _measure(depth: int, cases: list[Case], options: argparse.Namespace) -> list[Turn]:
    """All cases of a depth in one run under the launcher. Raises Failed."""
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
        settings += [f"timeouts.request_s={options.patience}", f"run_dir={out}"]
        launch = [sys.executable, "-m", "shmbridge.launch", "--cpu", "2", "--teacher", "benchmarks.trainee:build"]
        script = ["--", "-m", "benchmarks.trainee", out, json.dumps(told)]
        done = subprocess.run([*launch, *settings, *script], cwd=SCRIPTS, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"{done.stdout}{done.stderr}")
        return [Turn(*turn) for turn in json.loads(Path(out, "rank-0.json").read_text())]


def _cells(case: Case, turn: Turn, turns: dict[Case, Turn]) -> tuple[str, ...]:
    """x host: against what Trainer takes without a teacher, or the teacher alone."""
    step_s, plain_s = turn.step_s, turns[case._replace(depth=0, teacher_ms=0)].step_s
    host_s = max(plain_s, case.accumulation * case.teacher_ms / 1000)
    return (
        str(case.depth) if case.depth else "no teacher",
        str(case.accumulation),
        f"{case.teacher_ms} ms" if case.depth else "",
        f"{1000 * case.ideal_s:.0f} ms",
        f"{1000 * step_s:.1f} ms",
        f"{1000 * min(turn.steps):.1f} to {1000 * max(turn.steps):.1f}",
        f"{step_s / case.ideal_s:.3f}",
        f"{step_s / host_s:.3f}" if case.depth else "",
        f"{1000 * turn.first:+.1f} ms",
    )
