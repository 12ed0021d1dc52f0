"""Order, readiness, first failure wins, teardown: the real supervisor over fake jobs, with real processes and signals."""

from __future__ import annotations

import json
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
    ("teacher", "code", "failure"),
    [("ok", 0, None), ("raises after training", 1, "teacher failed: ValueError: no such weights")],
)
def test_a_script_that_never_connects_is_told_so_and_hides_no_failure(tmp_path, promise, teacher, code, failure):
    """The teacher may fail after the script has ended."""
    with faked(tmp_path, teacher=teacher, training="alone") as run:
        assert run.wait() == code
        assert "no rank connected to the bridge" in run.text
        assert "shmbridge.connect()" in run.text
        assert failure is None or failure in run.text
    promise.kept(f"no rank connected to the bridge; {failure or 'nothing else failed'}", exit_code=code)


def test_ranks_that_did_not_connect_are_named(tmp_path):
    with faked(tmp_path, training="half") as run:
        assert run.wait() == 0
        assert "rank 1 did not connect to the bridge" in run.text


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


def test_a_teacher_that_raises_while_loading_is_the_cause(tmp_path):
    """The report has the teacher's own traceback."""
    with faked(tmp_path, teacher="raise", training="wait") as run:
        assert run.wait() == 1
        report = (run.path / "report.txt").read_text()
        assert "teacher failed: ValueError: no such weights" in report
        assert "fake_teacher.py" in report
        assert json.loads((run.path / "report.json").read_text())["cause"]["phase"] == "loading"


@pytest.mark.parametrize(
    ("oom_kills", "counted"),
    [
        pytest.param("1", "rose by 1", marks=pytest.mark.promise(2, within="1 s")),
        ("unreadable", "is not readable"),
    ],
)
def test_a_teacher_that_is_killed_while_loading_tells_of_memory(tmp_path, promise, oom_kills, counted):
    """The kill and the kernel's counter are simulated: a test may not make a cgroup of its own."""
    with faked(tmp_path, teacher="killed", training="wait", FAKE_OOM_KILLS=oom_kills) as run:
        (killed,) = run.moments("killed")
        took_s = run.says("; stopping") - killed
        cause = run.cause(137)
        assert (cause["who"], cause["phase"]) == ("teacher", "loading")
        assert cause["reason"] == "killed by SIGKILL, likely out of memory"
        assert f"oom_kill counter {counted}" in run.text
        assert "(peak RSS)" in run.text
        assert "dmesg" in run.text
    promise.kept(f"{told(cause)}; the oom_kill counter {counted}; peak RSS (kill and counter simulated)", took_s, 137)


def test_a_sigkill_that_the_kernel_did_not_count_is_not_put_down_to_memory(tmp_path):
    with faked(tmp_path, teacher="killed", training="wait", FAKE_OOM_KILLS="0") as run:
        assert run.wait() == 137
        assert "teacher was killed by SIGKILL\n" in run.text
        assert "likely" not in run.text
        assert "oom_kill counter rose by 0" in run.text
        assert "the kernel's out-of-memory killer counted nothing" in run.text


def test_the_end_of_the_report_is_one_table(tmp_path):
    with faked(tmp_path, training="exit7") as run:
        run.wait()
        end = (run.path / "report.txt").read_text().rstrip().split("\n\n")[-1].splitlines()
        assert [line.split()[0] for line in end] == ["next", "log", "report"]
        assert {line[:10] for line in end} == {"  next    ", "  log     ", "  report  "}
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


def test_a_rank_that_exits_with_7_makes_the_launcher_exit_with_7(tmp_path):
    with faked(tmp_path, training="exit7") as run:
        assert run.wait() == 7
        assert "rank 1 exited with code 7" in run.text


def test_an_exception_in_a_rank_needs_no_decorator(tmp_path):
    with faked(tmp_path, training="raise") as run:
        assert run.wait() == 1
        report = json.loads((run.path / "report.json").read_text())
        assert report["cause"]["reason"] == "RuntimeError: boom"
        assert (report["cause"]["role"], report["cause"]["rank"]) == ("trainer", 1)
        assert "fake_training.py" in report["cause"]["traceback"]


def test_the_next_step_after_a_parity_error_of_the_vocabulary_is_another_student(tmp_path):
    with faked(tmp_path, training="parity") as run:
        assert run.wait() == 1
        report = json.loads((run.path / "report.json").read_text())
        assert "ParityError" in report["cause"]["reason"]
        assert "a student with the teacher's vocabulary" in report["action"]


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


@pytest.mark.parametrize("how", ["crashes late", "raises late"])
def test_a_teacher_that_crashes_when_the_ranks_have_finished_takes_nothing_from_training(tmp_path, how):
    """As in CUDA's teardown, while rank 1 writes its last checkpoint."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with faked(tmp_path, teacher=how, training="late", FAKE_GATE=str(gate)) as run:
        run.says("after the ranks had finished with it")
        assert "[launcher] warning: teacher" in run.text
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_both_jobs(tmp_path, number, code):
    with faked(tmp_path, training="wait") as run:
        run.says(" up", times=3)
        run.signal(number)
        assert run.wait() == code
        assert f"stopped by {number.name}" in run.text
        assert "SIGKILL" not in run.text


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


def test_a_teacher_that_ends_early_is_a_failure(tmp_path):
    with faked(tmp_path, teacher="early", training="wait") as run:
        assert run.wait() == 1
        assert "teacher ended although ranks were still to be served" in run.text


@pytest.mark.promise(18)
def test_reply_memory_that_does_not_fit_ends_the_run(tmp_path, promise):
    """A size that only the loaded teacher can tell."""
    with faked(tmp_path, teacher="huge", training="wait") as run:
        assert run.wait() == 2
        assert "of /dev/shm, and" in run.text
        assert "Lower ring.max_tokens (now 64)" in run.text
    promise.kept("once the teacher has loaded: the same, at the barrier", exit_code=2)
