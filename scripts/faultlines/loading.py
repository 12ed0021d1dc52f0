"""Rows 1 to 4: until training begins."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

from faultlines.rows import Stage

# The kernel's counter and its kill, both simulated: this process may not make a cgroup of its own.
COUNTED = """
import sys
from pathlib import Path
from launcher.cli.main import main
from launcher.plan import cgroup
cgroup.oom_kills = lambda: int(Path("note-counter").exists())
sys.exit(main())
"""


def teacher_cannot_load(stage: Stage) -> None:
    wrong = stage.launch("barrier", "--teacher", "/nowhere/model")
    stage.took("the refusal of a path", wrong.end() - wrong.began_at, 1.0)
    stage.ends_with(wrong, 2)
    stage.expect("teacher.model is '/nowhere/model'" in wrong.text, "the path is not named")
    run = stage.launch("barrier", teacher="raising")
    fault, _ = run.note("fault")
    stage.took("TeacherDied in both ranks", max(run.note(f"raised-{rank}")[0] for rank in (0, 1)) - fault, 1.0)
    stage.named(run, fault, 1.0)
    told = stage.root_cause(run, 1, "teacher", "RuntimeError: the weights are made of cheese", phase="loading")
    stage.expect('raise RuntimeError("the weights are made of cheese")' in run.text, "there is no traceback")
    stage.expect("DeadlineExceeded" not in run.text, "a rank ran into its deadline")
    stage.says(f"path: exit 2 at once; code: exit 1, its traceback; {told}")


def teacher_killed_while_loading(stage: Stage) -> None:
    run = stage.launch("barrier", teacher="loading", program=[sys.executable, "-c", COUNTED])
    run.note("barrier-0"), run.note("barrier-1")
    _, pid = run.note("loading")
    (stage.directory / "note-counter").touch()
    fault = time.monotonic()
    os.kill(int(pid), signal.SIGKILL)
    stage.named(run, fault, 1.0)
    told = stage.root_cause(run, 137, "teacher", "killed by SIGKILL, likely out of memory", phase="loading")
    memory = run.report.get("memory", "")
    stage.expect(re.search(r"oom_kill counter rose by 1.*peak RSS", memory), f"memory: {memory!r}")
    stage.says(f"counter and kill simulated: exit 137, {told}; {memory}")


def teacher_slow(stage: Stage) -> None:
    run = stage.launch("barrier", "timeouts.startup_s=4", "timeouts.shutdown_s=1", teacher="loading")
    fault = max(run.note(f"barrier-{rank}")[0] for rank in (0, 1))
    stage.named(run, fault, 6.0)
    reason = r"teacher 0 .* is in phase loading for [\d.]+ s after 4 s"
    told = stage.root_cause(run, 1, "rank [01]", reason, phase="barrier")
    stage.expect(re.search(r"teacher loads the model, [\d.]+ s", run.text), "no progress was told")
    stage.says(f"progress told; exit 1, {told}")


def rank_never_attaches(stage: Stage) -> None:
    run = stage.launch("late", "timeouts.report_s=2", "timeouts.startup_s=6", "timeouts.shutdown_s=1")
    fault, _ = run.note("waits")
    _, pid = run.note("not-attached")
    reported = run.says("^hang report.* rank 1 has not attached")
    stage.took("the hang report", reported - fault, 4.0)
    stage.named(run, fault, 8.0)
    told = stage.root_cause(run, 1, "rank 1", "did not attach within 6.0 s", pid=int(pid))
    cause = run.report.get("cause", {})
    traced = "load_the_data" in cause.get("traceback", "")
    labelled = re.search("py-spy is not installed.*nanosleep", cause.get("traceback", ""), re.S)
    stage.expect(traced or labelled, f"the stack of rank 1 is {cause.get('traceback')!r}")
    stack = "its stack (load_the_data)" if traced else "py-spy is not installed: the kernel's stack alone (nanosleep)"
    stage.says(f"hang report after {reported - fault:.1f} s, with {stack}; exit 1, {told}")
