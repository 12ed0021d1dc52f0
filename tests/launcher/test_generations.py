"""Where a generation may begin and end in the life of a kept session: while it loads, serves, drains; and launchers that are killed."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from pathlib import Path

import pytest

from launcher.keeper.client import Connection
from tests.harness import until
from tests.launcher.kept import Kept, ended
from tests.launcher.running import Launched, faked

LOADING = "loading (loading, 1 of 4)"
DRAINING = "finishing what the last training group left"


def begin_loading(kept: Kept, gate: Path, how: str = "gated", **variables: str) -> Launched:
    """`teacher start`, whose teacher waits at the gate."""
    start = kept.begin("--teacher-restarts", "1", FAKE_TEACHER=how, FAKE_GATE=str(gate), **variables)
    start.says("loads the model")
    return start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_generation_that_ends_while_the_teacher_loads_is_skipped(kept, gate, number, code):
    start = begin_loading(kept, gate)
    with kept.attach("wait") as run:
        until(lambda: run.ranks_signed_in, "ranks at the barrier")
        run.signal(number)
        assert run.process.wait(60) == code
        until(lambda: not run.processes(), "the end of the ranks")
    until(lambda: kept.status["held by"] == "nobody", "the end of the generation")
    assert kept.status["state"] == LOADING
    gate.write_bytes(b"")
    assert start.process.wait(60) == 0
    until(lambda: kept.status["state"] == "idle", "an idle teacher")
    kept.serves(ranks=3)
    kept.stop()


def test_a_load_that_fails_is_told_to_the_group_that_has_begun(kept, gate):
    """With the teacher's own traceback, in both reports."""
    start = begin_loading(kept, gate, "gated-raise")
    with kept.attach("wait") as run:
        until(lambda: run.ranks_signed_in, "ranks at the barrier")
        gate.write_bytes(b"")
        assert ended(run) == 1
        assert re.search(r"The run failed after [\d.]+ s: teacher failed: ValueError: no such weights", run.text)
        assert "fake_teacher.py" in run.text
    assert start.process.wait(60) == 1
    assert "teacher failed: ValueError: no such weights" in start.text
    kept.is_gone()


@pytest.mark.slow
def test_a_load_that_takes_too_long_ends_the_keeper_though_a_group_has_begun(kept, gate):
    start = kept.begin("timeouts.startup_s=12", FAKE_TEACHER="gated", FAKE_GATE=str(gate))
    start.says("loads the model")
    with kept.attach("wait") as run:
        until(lambda: run.ranks_signed_in, "ranks at the barrier")
        assert start.process.wait(60) == 1
        assert ended(run) == 1
        for text in (start.text, run.text):
            assert re.search(r": teacher is not ready: .*\(timeouts\.startup_s is 12\.0 s", text)
    kept.is_gone()


def test_the_death_of_a_keeper_that_loads_ends_the_group_that_has_begun(kept, gate):
    start = begin_loading(kept, gate)
    with kept.attach("wait") as run:
        until(lambda: run.ranks_signed_in, "ranks at the barrier")
        os.kill(kept.keeper, signal.SIGKILL)
        assert ended(run) == 1
        assert re.search(r"The run failed .*the keeper of the teacher big \(pid \d+\) is gone without a word", run.text)
    until(lambda: not start.processes(), "the end of the teacher")


def test_replies_that_do_not_fit_once_the_teacher_has_loaded_end_the_generation_alone(kept, gate):
    """The group began before their size was known."""
    full = kept.directory / "full"
    begin_loading(kept, gate, FAKE_FULL=str(full))
    with kept.attach("wait") as run:
        until(lambda: run.ranks_signed_in, "ranks at the barrier")
        full.write_text("1")
        gate.write_bytes(b"")
        assert ended(run) == 2
        assert re.search(r"The run failed .*/dev/shm has .* MiB free, segment .*", run.text)
        assert "Lower ring.max_tokens" in run.text
    full.unlink()
    kept.serves(ranks=3)
    kept.stop()


def test_a_teacher_that_is_loaded_again_under_a_group_keeps_the_session_as_it_is(kept, gate):
    start = begin_loading(kept, gate)
    gate.write_bytes(b"")
    assert start.process.wait(60) == 0
    with kept.attach("wait") as run:
        run.says(" is up.", times=2)
        first = str(kept.teacher)
        os.kill(int(first), signal.SIGKILL)
        until(lambda: kept.status["teacher"].rpartition("pid ")[2] not in (first, "none"), "the next teacher")
        assert kept.status["state"] == "held"
        gate.write_bytes(b"")
        until(lambda: "is back after" in kept.log, "the teacher's return")
        run.signal(signal.SIGINT)
        assert ended(run) == 130
    kept.serves(loaded=2, ranks=3)
    kept.stop()


def test_groups_wait_while_the_teacher_drains_and_one_of_them_is_served(kept, gate):
    kept.start(FAKE_DRAINED=str(gate))
    with kept.attach("ok") as run:
        assert ended(run) == 0
    with kept.attach("wait") as one, kept.attach("wait") as other:
        for run in (one, other):
            run.says(f"the kept teacher big is {DRAINING}; waiting")
        assert kept.status["held by"] == "nobody"
        gate.write_bytes(b"")
        loser = until(lambda: next((run for run in (one, other) if run.process.poll() is not None), None), "a refusal")
        winner = other if loser is one else one
        assert loser.process.returncode == 2
        assert f"held by pid {winner.process.pid}" in loser.text
        winner.says(" is up.", times=2)
        winner.signal(signal.SIGINT)
        assert ended(winner) == 130
    gate.write_bytes(b"")
    kept.stop()


def test_a_group_that_is_stopped_while_it_waits_leaves_nothing(kept, gate):
    kept.start(FAKE_DRAINED=str(gate))
    with kept.attach("ok") as run:
        assert ended(run) == 0
    before = set(kept.directory.glob("runs/*"))
    with kept.attach("wait") as run:
        run.says("waiting")
        run.signal(signal.SIGTERM)
        assert ended(run) == 143
    assert set(kept.directory.glob("runs/*")) == before
    gate.write_bytes(b"")
    until(lambda: kept.status["state"] == "idle", "an idle teacher")
    kept.stop()


@pytest.mark.parametrize("killed", [False, True])
def test_training_that_crashed_begins_again_only_once_the_teacher_has_drained(kept, gate, killed):
    """And a launcher that is killed while it waits for that leaves the session to the next group."""
    kept.start(FAKE_DRAINED=str(gate))
    with kept.attach("crashes once", "--train-restarts", "1") as run:
        run.says("training starts again")
        until(lambda: kept.status["state"] == DRAINING or not run.processes(), "a teacher that drains")
        assert "generation 2" not in kept.log
        if killed:
            run.signal(signal.SIGKILL)
            run.process.wait(60)
        gate.write_bytes(b"")
        if not killed:
            until(lambda: "generation 2" in kept.log, "the second generation")
            gate.write_bytes(b"")  # of the second generation
            assert ended(run) == 0, run.text
            assert kept.loaded == 1
    until(lambda: kept.status["state"] == "idle", "an idle teacher")
    assert kept.status["held by"] == "nobody"
    kept.stop()


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_teacher_that_dies_before_training_begins_again_is_not_done_with(kept, gate, restarts):
    """It is started again where that is allowed, and is the cause where it is not."""
    more = ["--train-restarts", "1", "--teacher-restarts", str(restarts)]
    with faked(kept.directory, "ok", "crashes once", more=more, FAKE_DRAINED=str(gate)) as run:
        run.says("training starts again")
        until(lambda: not run.processes("fake_training.py"), "the end of the ranks")
        os.kill(run.below_shim("fake_teacher.py"), signal.SIGKILL)
        if restarts:
            run.says("teacher up", times=2)
            gate.write_bytes(b"")
            assert run.wait() == 0, run.text
            assert "after the ranks had finished with it" not in run.text
        else:
            cause = run.cause(137)
            assert (cause["who"], cause["signal"]) == ("teacher", signal.SIGKILL)


def test_a_group_that_waits_is_told_of_the_death_of_the_teacher(kept, gate):
    kept.start(FAKE_DRAINED=str(gate))
    with kept.attach("ok") as run:
        assert ended(run) == 0
    with kept.attach("ok") as run:
        run.says("waiting")
        os.kill(kept.teacher, signal.SIGKILL)
        assert ended(run) == 2
        assert "the kept teacher big ends: teacher was killed by SIGKILL" in run.text
    kept.is_gone()


def test_neither_visitors_nor_sigusr1_end_the_wait_of_a_group(kept, gate):
    kept.start(FAKE_DRAINED=str(gate))
    with kept.attach("ok") as run:
        assert ended(run) == 0
    with kept.attach("ok") as run, contextlib.ExitStack() as visitors:
        run.says("waiting")
        for _ in range(40):
            visitors.enter_context(contextlib.closing(Connection("big")))
        run.signal(signal.SIGUSR1)
        gate.write_bytes(b"")
        run.says(" is up.", times=2)
        gate.write_bytes(b"")
        assert ended(run) == 0, run.text
    kept.stop()


def test_a_second_ctrl_c_ends_a_keeper_at_once_though_a_group_holds_it(kept):
    kept.start("timeouts.shutdown_s=60")
    keeper = os.pidfd_open(kept.keeper)
    with kept.attach("stubborn") as run:
        run.says(" is up.", times=2)
        signal.pidfd_send_signal(keeper, signal.SIGINT)
        run.says("stopping")
        signal.pidfd_send_signal(keeper, signal.SIGINT)
        assert select.select([keeper], [], [], 4)[0], kept.log
        os.close(keeper)
        run.signal(signal.SIGINT)
        assert ended(run) == 143
    kept.is_gone()
