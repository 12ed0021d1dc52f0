"""Rows 14 to 16 and 22 to 24: stops, what is kept, what goes on, the end."""

from __future__ import annotations

import os
import signal
import time

from faultlines.rows import GRACE_S, Stage
from faultlines.runs import Run, python, until


def ignores_sigterm(stage: Stage) -> None:
    run = stage.launch("deaf", "timeouts.shutdown_s=2")
    _trains(run)
    fault = run.signal(signal.SIGTERM)
    stage.took("the end after one grace of 2 s", run.end() - fault, 3.0)
    stage.ends_with(run, 143)
    stage.expect(run.text.count("SIGKILL for") == 1, "there was not one SIGKILL for all")
    for path in stage.directory.glob("note-trains-*"):
        path.unlink()
    twice = stage.launch("deaf", "timeouts.shutdown_s=300")
    _trains(twice)
    twice.signal(signal.SIGINT)
    twice.says("Ctrl-C kills at once")
    fault = twice.signal(signal.SIGINT)
    at_once = twice.end() - fault
    stage.took("the end after a second Ctrl-C", at_once, 1.0)
    stage.ends_with(twice, 130)
    first = stage.measured[0][1]
    stage.says(
        f"grace 2 s: SIGKILL for all, ended after {first:.2f} s, exit 143; second Ctrl-C: {at_once:.2f} s, exit 130"
    )


def training_crashes_beside_a_kept_teacher(stage: Stage) -> None:
    runtime = {"XDG_RUNTIME_DIR": str(stage.directory)}
    settings = ["--teacher", "teachers:plain", "--cpu", "2", "ring.max_tokens=64", "timeouts.shutdown_s=5"]
    kept = stage.start(python("shmbridge.launch", "teacher", "start", "kept", *settings), **runtime)
    stage.expect(kept.code == 0, f"`teacher start` ended with {kept.code}: {kept.last_words}")
    attach = python("shmbridge.launch", "--attach", "kept", "--cpu", "2", "--", "train.py", "crashes_once")
    first = stage.attached = stage.start(attach, **runtime)
    fault, _ = first.note("fault")
    stage.named(first, fault, 2.0)
    told = stage.root_cause(first, 137, "rank 1", "killed by SIGKILL", step=5)
    second = stage.start(attach, **runtime)
    stage.expect(second.code == 0, f"the next training ended with {second.code}: {second.last_words}")
    stage.expect((stage.directory / "note-ready-2").exists(), "the next training was not served")
    loads = len(list(stage.directory.glob("note-loaded-*")))
    stage.expect(loads == 1, f"the teacher was loaded {loads} times")
    stop = stage.start(python("shmbridge.launch", "teacher", "stop", "kept"), **runtime)
    stage.expect(stop.code == 0, f"`teacher stop` ended with {stop.code}: {stop.last_words}")
    stage.attached = None
    for run in (first, second, kept):
        stage.leaves_nothing(run)
    stage.says(f"exit 137, {told}; the next --attach trained on, exit 0; the teacher was loaded once")


def forward_raises(stage: Stage) -> None:
    run = stage.launch("bad_batches", teacher="small")
    halved_s, raised_s, traced = run.note("raised")[1].split()
    stage.took("8 rows where 2 fit", float(halved_s), 1.0)
    stage.took("TeacherError", float(raised_s), 1.0)
    stage.expect(traced == "True", "the rank did not get the teacher's traceback")
    for rank in (0, 1):
        run.note(f"went-on-{rank}")
    stage.ends_with(run, 0)
    stage.says(
        "halved until it fitted, right answers; the bad batch's rank got the teacher's traceback; all went on, exit 0"
    )


def unlike_lengths(stage: Stage) -> None:
    run = stage.launch("unlike_lengths")
    last = max(run.note(f"closed-{rank}")[0] for rank in (0, 1))
    until(lambda: not run.processes("shmbridge.teacher.main"), "the end of the teacher")
    stage.took("the end of the teacher", time.monotonic() - last, 2.0)
    stage.ends(run, last, 2.0 + GRACE_S)
    stage.ends_with(run, 0)
    stage.says("5 and 50 batches; the teacher ended after the last rank had closed; exit 0")


def ranks_save(stage: Stage) -> None:
    run = stage.launch("interrupted")
    _trains(run)
    fault = run.signal(signal.SIGINT)
    _saves(stage, run, "Ctrl-C", fault, 130)
    for path in stage.directory.glob("note-*"):
        path.unlink()
    run = stage.launch("terminated")
    _trains(run)
    fault = time.monotonic()
    for pid in [run.process.pid, *run.processes()]:  # as Slurm does it
        os.kill(pid, signal.SIGTERM)
    _saves(stage, run, "SIGTERM to every process", fault, 143)
    for rank in (0, 1):
        stage.expect(run.note(f"told-{rank}")[1] == "1", f"rank {rank} was not told once")
    stage.says(
        "both ranks saved, with replies, after Ctrl-C (exit 130) and SIGTERM to every process (exit 143, told once)"
    )


def _saves(stage: Stage, run: Run, what: str, fault: float, code: int) -> None:
    saved = max(run.note(f"saved-{rank}")[0] for rank in (0, 1))
    stage.took(f"the save after {what}", saved - fault, GRACE_S)
    stage.ends(run, fault, GRACE_S)
    stage.ends_with(run, code)
    for text in ("Traceback", "Died", "The run failed"):
        stage.expect(text not in run.text, f"{text!r} is told after {what}")


def never_connects(stage: Stage) -> None:
    for teacher, code in (("plain", 0), ("failing_late", 1)):
        run = stage.launch("alone", teacher=teacher)
        ended = max(run.note(f"alone-{rank}")[0] for rank in (0, 1))
        stage.ends(run, ended, 2 * GRACE_S)
        stage.ends_with(run, code)
        if code == 0:
            stage.expect("no rank connected to the bridge" in run.text, "it is not told that no rank connected")
        for path in stage.directory.glob("note-alone-*"):
            path.unlink()
    stage.expect("the weights are made of cheese" in run.text, "the teacher's failure is not told")
    stage.says("'no rank connected to the bridge', exit 0; with a teacher that fails: its traceback, exit 1")


def _trains(run: Run) -> None:
    for rank in (0, 1):
        run.note(f"trains-{rank}")
