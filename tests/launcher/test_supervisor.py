"""Order, readiness, first failure wins, teardown: the real supervisor over fake jobs, with real processes and signals."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.harness import until
from tests.launcher.running import faked, parent, told


def test_a_run_that_ends_well_leaves_nothing_and_exits_0(tmp_path):
    with faked(tmp_path) as run:
        assert run.wait() == 0
        assert "[launcher] teacher ready in" in run.text
        assert "[launcher] done in" in run.text
        assert "[teacher]  teacher up" in run.text
        assert not (run.path / "report.txt").exists()


@pytest.mark.promise(24)
@pytest.mark.parametrize(
    ("teacher", "training", "code", "told"),
    [
        ("ok", "alone", 0, ["no rank connected to the bridge", "shmbridge.connect()"]),
        ("raises after training", "alone", 1, ["no rank connected to the bridge", "teacher failed: ValueError"]),
        ("ok", "half", 0, ["rank 1 did not connect to the bridge"]),
    ],
)
def test_a_script_that_never_connects_is_told_so_and_hides_no_failure(tmp_path, promise, teacher, training, code, told):
    """The teacher may fail after the script has ended."""
    with faked(tmp_path, teacher=teacher, training=training) as run:
        assert run.wait() == code
        assert [text for text in told if text not in run.text] == []
    promise.kept("; ".join(told), exit_code=code)


@pytest.mark.promise(22, within="2 s")
def test_the_teacher_ends_when_the_last_rank_has_closed(tmp_path, promise):
    """Training goes on alone afterwards, and that is no failure."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with faked(tmp_path, training="late", FAKE_GATE=str(gate)) as run:
        closed = max(run.moments("closed", 2))
        until(lambda: not run.processes("fake_teacher.py"), "the end of the teacher")
        took_s = time.monotonic() - closed
        assert run.process.poll() is None
        gate.write_bytes(b"")
        assert run.wait() == 0
    promise.kept("the teacher ended after the last rank had closed; training went on alone", took_s, 0)


def test_a_teacher_that_does_not_end_is_ended_after_the_grace(tmp_path):
    with faked(tmp_path, teacher="lingering", grace_s=0.2) as run:
        assert run.wait() == 0
        assert "the grace of 0.2 s (timeouts.shutdown_s) is over" in run.text


@pytest.mark.parametrize(
    ("oom_kills", "likely", "counted", "action"),
    [
        pytest.param(
            *("1", ", likely out of memory", "rose by 1", "See `dmesg`"), marks=pytest.mark.promise(2, within="1 s")
        ),
        ("unreadable", ", likely out of memory", "is not readable", "See `dmesg`"),
        ("0", "", "rose by 0", "Find out who or what sent SIGKILL"),
    ],
)
def test_a_teacher_that_is_killed_while_loading_tells_of_memory(tmp_path, promise, oom_kills, likely, counted, action):
    """Unless the kernel has counted no such kill. Kill and counter are simulated: a test may not make a cgroup of its own."""
    with faked(tmp_path, teacher="killed", training="wait", FAKE_OOM_KILLS=oom_kills) as run:
        (killed,) = run.moments("killed")
        took_s = run.says("; stopping") - killed
        cause = run.cause(137)
        assert (cause["who"], cause["phase"]) == ("teacher", "loading")
        assert cause["reason"] == f"killed by SIGKILL{likely}"
        report = run.report
        assert f"oom_kill counter {counted}" in report["memory"] and "(peak RSS)" in report["memory"]
        assert report["action"].startswith(action)
    promise.kept(f"{told(cause)}; the oom_kill counter {counted}; peak RSS (kill and counter simulated)", took_s, 137)


@pytest.mark.parametrize(
    ("teacher", "training", "code", "cause", "action"),
    [
        ("raise", "wait", 1, ("teacher", "loading", "ValueError: no such weights"), "Correct teacher.model"),
        ("loading,raise", "wait", 1, ("teacher 1", "loading", "ValueError: no such weights"), "Correct teacher.model"),
        ("ok", "exit7", 7, ("rank 1", "training", "exited with code 7"), "Its log tells why"),
        ("ok", "raise", 1, ("rank 1", "training", "RuntimeError: boom"), "Correct what the traceback tells"),
        ("ok", "parity", 1, (None, "training", "shmbridge.errors.ParityError"), "Take a student with the teacher's"),
        ("early", "wait", 1, ("launcher", "unknown", "teacher ended although ranks were"), "See above"),
        ("ok,early", "wait", 1, ("launcher", "unknown", "teacher 1 ended although ranks were"), "See above"),
    ],
)
def test_the_report_names_the_cause_and_the_next_step(tmp_path, teacher, training, code, cause, action):
    with faked(tmp_path, teacher=teacher, training=training) as run:
        found = run.cause(code)
        who, phase, reason = cause
        assert (found["phase"], found["who"]) == (phase, who or found["who"])
        assert found["reason"].startswith(reason)
        assert bool(found["traceback"]) == ("Error: " in found["reason"])
        assert run.report["action"].startswith(action)
        end = (run.path / "report.txt").read_text().rstrip().split("\n\n")[-1].splitlines()
        assert {line[:10] for line in end} <= {"  next    ", "  log     ", "  report  ", " " * 10}
        assert end[-1].endswith(f"{run.path.name}/report.txt")


@pytest.mark.promise(5, within="1 s")
def test_a_rank_that_is_killed_is_named(tmp_path, promise):
    with faked(tmp_path, training="killed") as run:
        (killed,) = run.moments("killed")
        took_s = run.says("; stopping") - killed
        cause = run.cause(137)
        assert (cause["who"], cause["reason"]) == ("rank 1", "killed by SIGKILL")
        assert (cause["phase"], cause["step"], cause["sequence"]) == ("training", 41, 42)
    promise.kept(told(cause), took_s, 137)


def test_the_death_of_the_teacher_is_the_cause_and_not_what_the_ranks_say(tmp_path):
    with faked(tmp_path, training="wait") as run:
        run.says(" up", times=3)
        os.kill(run.below_shim("fake_teacher.py"), signal.SIGKILL)
        assert run.wait() == 137
        assert "The run failed" in run.text
        assert "teacher was killed by SIGKILL" in run.text
        assert "TeacherDied" in (run.path / "torchrun.log").read_text()


def test_the_teacher_is_the_cause_though_its_end_is_seen_after_what_the_ranks_say(tmp_path):
    """With a shim that tells late: the ranks' TeacherDied alone decides only for want of anything better."""
    with faked(tmp_path, training="wait") as run:
        run.says(" up", times=3)
        teacher = run.below_shim("fake_teacher.py")
        os.kill(parent(teacher), signal.SIGSTOP)
        os.kill(teacher, signal.SIGKILL)
        run.says("stopping")
        assert "teacher was killed" not in run.text
        os.kill(parent(teacher), signal.SIGCONT)
        assert run.wait() == 137
        assert "The run failed" in run.text
        assert ": teacher was killed by SIGKILL" in run.text


@pytest.mark.parametrize(
    ("teacher", "training"), [("crashes late", "late"), ("raises late", "late"), ("crashes late,ok", "leaves")]
)
def test_a_teacher_that_crashes_when_its_ranks_have_finished_takes_nothing_from_training(tmp_path, teacher, training):
    """As in CUDA's teardown, while rank 1 writes its last checkpoint, or is served by the other replica."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with faked(tmp_path, teacher=teacher, training=training, FAKE_GATE=str(gate)) as run:
        run.says("after the ranks had finished with it")
        assert f"[launcher] warning: teacher{' 0' * (training == 'leaves')} " in " ".join(run.text.split())
        assert run.process.poll() is None
        gate.write_bytes(b"")
        assert run.wait() == 0
        assert run.text.count("warning") == 1
        assert "The run failed" not in run.text


def test_the_death_of_torchrun_takes_ranks_and_workers_along(tmp_path):
    with faked(tmp_path, training="workers") as run:
        run.says(" up", times=3)
        assert len(run.processes("sleep 600")) == 2
        os.kill(run.below_shim("fake_training.py"), signal.SIGKILL)
        assert run.wait() == 137
        assert "torchrun was killed by SIGKILL" in run.text


@pytest.mark.parametrize(("teacher", "line", "times"), [("ok", "up", 3), ("loading", "teacher loading", 1)])
def test_the_death_of_the_launcher_ends_both_jobs(tmp_path, teacher, line, times):
    with faked(tmp_path, teacher=teacher, training="workers") as run:
        run.says(line, times=times)
        run.signal(signal.SIGKILL)
        run.process.wait()
        until(lambda: not run.processes(), "the end of both jobs")


def test_the_death_of_a_shim_leaves_nothing(tmp_path):
    with faked(tmp_path, training="workers") as run:
        run.says(" up", times=3)
        os.kill(run.processes("shim.py")[-1], signal.SIGKILL)
        assert run.wait() == 137


@pytest.mark.parametrize(
    ("number", "code", "taken"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 15), (signal.SIGHUP, 129, 15)]
)
def test_each_rank_gets_the_signal_that_was_sent_once_and_is_served_while_it_saves(tmp_path, number, code, taken):
    """One rank ends at once; the teacher waits for the other."""
    gate = tmp_path / "gate"
    with faked(tmp_path, training="notes", grace_s=60, FAKE_GATE=str(gate)) as run:
        run.says(" up", times=3)
        run.signal(number)
        run.says(f"takes note of {taken}", times=2)
        (tmp_path / "gate0").touch()
        run.says("rank 0 saves beside sleeping teacher")
        until(lambda: len(run.processes("fake_training.py")) == 3, "the end of rank 0")
        (tmp_path / "gate1").touch()
        assert run.wait() == code
        assert "rank 1 saves beside sleeping teacher" in run.text
        assert run.text.count("takes note") == 2
        assert run.text.count(f": stopped by {number.name}") == 0
        assert "The run failed" not in run.text
        assert not (run.path / "report.txt").exists()


def test_training_that_crashed_begins_again_once_the_teacher_has_drained(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with faked(
        tmp_path, training="crashes once", more=["--train-restarts", "1", "timeouts.report_s=1"], FAKE_DRAINED=str(gate)
    ) as run:
        run.says("training starts again (restart 1 of 1)")
        until(lambda: not run.processes("fake_training.py"), "the end of what crashed")
        for times in (1, 2):  # the launcher has looked in between
            run.signal(signal.SIGUSR1)
            run.says("SIGUSR1 was sent to no rank", times=times)
        run.says("and has not finished what the last training group left")  # the monitor looks on
        gate.write_bytes(b"")
        run.says("teacher up", times=2)
        gate.write_bytes(b"")  # of the second generation
        assert run.wait() == 0


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_teacher_that_dies_in_a_run_that_stops_ends_the_ranks_waits(tmp_path, restarts):
    with faked(tmp_path, training="waits", grace_s=60, more=["--teacher-restarts", restarts]) as run:
        run.says(" up", times=3)
        run.signal(signal.SIGTERM)
        run.says("takes note", times=2)
        os.kill(run.below_shim("fake_teacher.py"), signal.SIGKILL)
        assert run.wait() == 143
        for rank in (0, 1):
            assert f"rank {rank} saves: RunStopped: launcher 0" in run.text
        assert "training waits for a new one" not in run.text
        assert run.text.count(": stopped by SIGTERM") == 2


@pytest.mark.promise(14, within="grace+1 s", grace=0.3)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_jobs_that_ignore_sigterm_are_killed_after_one_grace(tmp_path, promise, number, code):
    with faked(tmp_path, teacher="stubborn", training="stubborn", grace_s=0.3) as run:
        run.says(" up", times=3)
        asked = run.signal(number)
        assert run.wait() == code
        took_s = time.monotonic() - asked
        assert run.text.count("SIGKILL for") == 1
    promise.kept("one grace for teacher and training, then SIGKILL", took_s, code)


@pytest.mark.promise(14, within="grace+1 s", grace=0)
def test_a_second_ctrl_c_kills_at_once(tmp_path, promise):
    """The grace of five minutes is not waited for."""
    with faked(tmp_path, teacher="stubborn", training="stubborn", grace_s=300) as run:
        run.says(" up", times=3)
        run.signal(signal.SIGINT)
        run.says("Ctrl-C kills at once")
        asked = run.signal(signal.SIGINT)
        assert run.wait() == 130
        took_s = time.monotonic() - asked
        assert "grace" not in run.text
    promise.kept("a second Ctrl-C kills at once", took_s, 130)


def test_sigusr1_goes_to_the_ranks_that_handle_it_and_to_nothing_else(tmp_path):
    with faked(tmp_path, training="usr1") as run:
        run.says(" up", times=3)
        run.signal(signal.SIGUSR1)
        run.says("rank 0 saved")
        run.says("SIGUSR1 was sent to rank 0; not to 1, without a handler")
        run.signal(signal.SIGUSR2)
        run.says("SIGUSR2 was sent to no rank")
        run.signal(signal.SIGTERM)
        assert run.wait() == 143


def test_signals_sent_to_everything_end_neither_teacher_nor_shims(tmp_path):
    """As Slurm sends them to every process of a step."""
    with faked(tmp_path, training="wait") as run:
        run.says(" up", times=3)
        for pid in [*run.processes("shim.py"), *run.processes("fake_teacher.py")]:
            for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        run.signal(signal.SIGTERM)
        assert run.wait() == 143


@pytest.mark.promise(18)
def test_reply_memory_that_does_not_fit_ends_the_run(tmp_path, promise):
    """A size that only the loaded teacher can tell."""
    with faked(tmp_path, teacher="huge", training="wait") as run:
        assert run.wait() == 2
        assert "of /dev/shm, and" in run.text
        assert "Lower ring.max_tokens (now 64)" in run.text
    promise.kept("once the teacher has loaded: the same, at the barrier", exit_code=2)
