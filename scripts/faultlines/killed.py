"""Rows 5 to 8, 12 and 13: SIGKILL while training."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

from faultlines.rows import GRACE_S, Stage
from faultlines.runs import ROOT, Run, until

UNFINISHED = 120


def rank_killed_while_writing(stage: Stage) -> None:
    run = stage.launch("half_written")
    fault, _ = run.note("fault")
    stage.named(run, fault, 1.0)
    told = stage.root_cause(run, 137, "rank 1", "killed by SIGKILL", step=4, phase=True, sequence=True)
    stage.expect(UNFINISHED not in stage.seen_by_teacher(), "the teacher has read the unfinished slot")
    stage.says(f"the slot was not read; exit 137, {told}")


def rank_killed_in_flight(stage: Stage) -> None:
    run = stage.launch("dies_in_flight", "--train-restarts", "2")
    for generation, moment in ((1, "after submit"), (2, "holding a lease")):
        fault, _ = run.note(f"death-{generation}")
        old = f"-g{generation}-"
        until(lambda old=old: not any(old in name for name in run.objects), "the end of the old generation's memory")
        stage.took(f"{moment}: the old lanes were drained and removed", time.monotonic() - fault, 1.0)
    run.note("generation-3")
    stage.ends_with(run, 0)
    stage.expect(len(list(stage.directory.glob("note-loaded-*"))) == 1, "the teacher was loaded more than once")
    worst = ", ".join(f"{seconds:.2f} s {what.split(':')[0]}" for what, seconds, _ in stage.measured)
    stage.says(f"drained and reclaimed: {worst}; two more generations were served by the same teacher; exit 0")


def teacher_killed_in_a_forward(stage: Stage) -> None:
    run = stage.launch("asks_the_mortal", teacher="mortal")
    fault, _ = run.note("fault")
    raised = [run.note(f"raised-{rank}") for rank in (0, 1)]
    stage.took("TeacherDied in every rank", max(at for at, _ in raised) - fault, 1.0)
    for rank, (_, text) in enumerate(raised):
        stage.expect(re.search("step 6.*sequence|sequence.*step 6", text, re.S), f"rank {rank} was told: {text!r}")
    stage.named(run, fault, 1.0)
    told = stage.root_cause(run, 137, "teacher", "killed by SIGKILL", phase="forward", step=6, sequence=True)
    (stage.directory / "note-fault").unlink()
    again = stage.launch("asks_the_mortal", "--teacher-restarts", "1", teacher="mortal")
    for rank in (0, 1):
        again.note(f"answered-{rank}")
    stage.ends_with(again, 0)
    stage.says(f"exit 137, {told}; with --teacher-restarts 1 both ranks got their answers, exit 0")


def teacher_killed_in_a_cuda_copy(stage: Stage) -> None:
    run = stage.start([sys.executable, "-m", "faultlines.standin"], PYTHONPATH=f"{ROOT}:{ROOT / 'scripts'}")
    run.end()
    stage.expect(run.code == 0, f"the stand-in ended with {run.code}: {run.last_words}")
    stage.leaves_nothing(run)
    found = [re.match(r"(.+): ([\d.]+) s, (\d+) right, (\d+) torn, (\d+) wrong, (\w+)", line) for _, line in run.lines]
    cases = [match.groups() for match in found if match]
    stage.expect(len(cases) == 12, f"{len(cases)} of 12 kills told their end: {run.last_words}")
    for point, seconds, _, _, wrong, error in cases:
        stage.took(f"killed {point}: {error}", float(seconds), 1.0)
        stage.expect(wrong == "0", f"{wrong} wrong tensors were handed out ({point})")
        stage.expect(error in ("TeacherDied", "TornReply"), f"the rank got {error} ({point})")
    right = sum(int(case[2]) for case in cases)
    stage.says(
        f"stand-in for the GPU: {len(cases)} kills at 5 points of a copy, two of them with an error of CUDA after it, {right} "
        "replies handed out before them, all whole; then TeacherDied"
    )


def torchrun_killed(stage: Stage) -> None:
    run = _training(stage)
    shims = set(run.processes("shim.py"))
    (torchrun,) = [pid for pid in run.processes("elastic.py") if pid not in shims]
    fault = time.monotonic()
    os.kill(torchrun, signal.SIGKILL)
    until(lambda: not run.processes("train.py"), "the end of the ranks")
    stage.took("the end of the ranks", time.monotonic() - fault, 2.0)
    stage.ends(run, fault, 2.0 + GRACE_S)
    stage.root_cause(run, 137, "torchrun", "killed by SIGKILL")
    stage.says("both ranks and the teacher ended with it; exit 137, torchrun was killed by SIGKILL")


def launcher_killed(stage: Stage) -> None:
    run = _training(stage)
    fault = run.signal(signal.SIGKILL)
    until(lambda: not run.processes(), "the end of both jobs")
    stage.took("the end of both jobs", time.monotonic() - fault, 2.0)
    left = run.objects
    following = stage.start([sys.executable, "-m", "shmbridge.launch", "--no-teacher", "--cpu", "1", "--", "notes.py"])
    stage.expect(following.code == 0, f"the next start ended with {following.code}: {following.last_words}")
    stage.leaves_nothing(run)
    stage.expect("removed" in following.text or not left, "the next start tells nothing of what it removed")
    stage.says(f"teacher, torchrun and ranks ended; the next start reclaimed {len(left)} objects")


def _training(stage: Stage) -> Run:
    run = stage.launch("loop")
    for rank in (0, 1):
        run.note(f"trains-{rank}")
    return run
