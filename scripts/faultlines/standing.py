"""Rows 9 to 11: nobody has died, and nothing moves."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from faultlines.rows import Stage
from faultlines.runs import Run

_LIMIT_MORE_S = 2.0


def stopped(stage: Stage) -> None:
    run = stage.launch("loop", "timeouts.report_s=3")
    pids = [int(run.note(f"trains-{rank}")[1]) for rank in (0, 1)]
    (teacher,) = [int(path.name.rpartition("-")[2]) for path in stage.directory.glob("note-loaded-*")]
    for number, (who, pid) in enumerate((("rank 1", pids[1]), ("teacher", teacher)), 1):
        fault = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        reported = run.says("^hang report", times=number)
        os.kill(pid, signal.SIGCONT)
        stage.took(f"the hang report of the stopped {who}", reported - fault, 3 + _LIMIT_MORE_S)
        sentence = _hang(run, number)["verdict"]["sentence"]
        stage.expect(f"(pid {pid}) is stopped, not dead" in sentence, f"the report says: {sentence}")
        stage.says(f"{who}: '{sentence.split(' (SIGSTOP')[0]}'")
    (stage.directory / "note-enough").touch()
    stage.ends_with(run, 0)
    stage.says("continued, and trained to the end, exit 0")


def holds_the_gil(stage: Stage) -> None:
    os.mkfifo(stage.directory / "pipe")
    run = stage.launch("holds_the_gil", "timeouts.report_s=6")
    fault, text = run.note("fault")
    reported = run.says("^hang report")
    (stage.directory / "pipe").write_bytes(b"x")
    stage.took("the hang report", reported - fault, 6 + _LIMIT_MORE_S)
    found = _hang(run, 1)
    sentence = found["verdict"]["sentence"]
    stage.expect("has not run Python for" in sentence and text.split()[1] in json.dumps(found), f"it says: {sentence}")
    stage.expect("native_call" in json.dumps(_stacks(found, "rank 1")), "its stack does not show the call")
    stage.ends_with(run, 0)
    stage.says(f"'{sentence}'; its stack shows native_call(); let go, it trained to the end, exit 0")


def skips_an_exchange(stage: Stage) -> None:
    run = stage.launch("skips_an_exchange", "teacher.collect=lockstep", "timeouts.report_s=3", "timeouts.shutdown_s=1")
    fault, _ = run.note("fault")
    reported = run.says("^hang report")
    stage.took("the hang report", reported - fault, 3 + _LIMIT_MORE_S)
    found = _hang(run, 1)
    sentence = found["verdict"]["sentence"]
    stage.expect(sentence.lower().startswith("rank 1") and "at barrier() in save" in sentence, f"it says: {sentence}")
    steps = {one["who"]: one["step"] for one in found["facts"]["participants"]}
    stage.expect(steps["rank 0"] == 5, f"the step of the others is not told: {steps}")
    for who in ("rank 0", "rank 1", "teacher"):
        stage.expect(_stacks(found, who), f"there is no stack of {who}")
    run.signal(signal.SIGINT)
    stage.ends_with(run, 130)
    stage.says(f"'{sentence}'; the stacks of all; Ctrl-C: exit 130")


def _hang(run: Run, number: int) -> dict[str, Any]:
    """A hang report as the run directory keeps it."""
    found: dict[str, Any] = json.loads((run.path / f"hang-{number}.json").read_text())
    return found


def _stacks(found: dict[str, Any], who: str) -> list[Any]:
    """The threads of a participant."""
    return next((one["stacks"]["threads"] for one in found["facts"]["participants"] if one["who"] == who), [])
