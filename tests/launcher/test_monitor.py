"""What is reported when, over a clock that the test turns."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launcher.console.terminal import Console
from launcher.hang import rules, snapshot, stacks
from launcher.hang.monitor import Monitor
from launcher.supervisor import cause
from shmbridge import config
from shmbridge.output_spec import Extent
from shmbridge.shm import process
from shmbridge.shm.layout import RecordWord
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from tests.harness import Child, until

REPORT_S, STARTUP_S = 20.0, 60.0


class Clocked:
    """A session whose participants are all this process, and a monitor of it with a tick each second of a made-up
    clock."""

    def __init__(self, run: Path, lanes: int, *overrides: str) -> None:
        base = [
            "teacher.model=a:b",
            "ring.max_tokens=64",
            f"timeouts.report_s={REPORT_S}",
            f"timeouts.startup_s={STARTUP_S}",
        ]
        self.settings = config.load(overrides=[*base, *overrides])
        self.owner = Owner(self.settings, lanes)
        self.token = self.owner.start_generation()
        self.monitor = Monitor(self.owner, self.settings, run, Console())
        self.now = 1000.0
        self.monitor.due(self.now)

    def teacher(self) -> TeacherSession:
        session = TeacherSession(self.token)
        session.attach(self.token.generation)
        session.open_barrier()
        session.record.enter(Phase.COLLECTING)
        return session

    def rank(self, lane: int) -> RankSession:
        session = RankSession(self.token, lane)
        session.record.enter(Phase.TRAINING)
        return session

    def ticks(self, seconds: int, every: float = 1.0) -> list[tuple[float, list[str]]]:
        """(seconds from here, who is waited for) of each tick that reports."""
        began, found = self.now, []
        for _ in range(int(seconds / every)):
            self.now += every
            due = self.monitor.due(self.now)
            if due:
                found.append((self.now - began, sorted({who for finding, _ in due for who in finding.suspects})))
        return found


def ask(rank: RankSession) -> int:
    ring = rank.ring
    sequence = ring.claim()
    ring.write_request(sequence, 1, Extent(1, 1, None), memoryview(bytes(8)))
    ring.publish_request(sequence)
    rank.record.at(1, sequence)
    return sequence


def answer(rank: RankSession, sequence: int) -> None:
    rank.ring.publish_reply(sequence)
    rank.ring.release(sequence)


def fall_silent(rank: RankSession) -> None:
    rank.record.words[RecordWord.HEARTBEAT_NS] = time.monotonic_ns() - int((rules.STALE_S + 1) * 1e9)


@pytest.fixture
def clocked(tmp_path):
    made: list[Clocked] = []

    def make(lanes: int = 2, *overrides: str) -> Clocked:
        made.append(Clocked(tmp_path, lanes, *overrides))
        return made[-1]

    yield make
    for one in made:
        one.owner.close()


def test_an_unanswered_request_is_due_then_again_at_doubling_times(clocked):
    on = clocked(1)
    on.teacher()
    ask(on.rank(0))
    assert on.ticks(200) == [(21.0, ["teacher"]), (41.0, ["teacher"]), (81.0, ["teacher"]), (161.0, ["teacher"])]


def test_what_belongs_to_one_standstill_is_one_report(clocked):
    on = clocked(2)
    on.teacher()
    asks, silent = on.rank(0), on.rank(1)
    ask(asks)
    on.ticks(3)
    fall_silent(silent)
    assert on.ticks(37) == [(18.0, ["rank 1", "teacher"])]


def test_what_is_answered_is_no_longer_owed(clocked):
    on = clocked(1)
    on.teacher()
    rank = on.rank(0)
    for _ in range(5):
        sequence = ask(rank)
        assert on.ticks(15) == []
        answer(rank, sequence)


def test_only_time_in_which_the_launcher_ran_counts(clocked):
    on = clocked(1)
    on.teacher()
    ask(on.rank(0))
    on.ticks(1)
    on.now += 3600  # a laptop that was closed
    assert on.ticks(14) == []
    assert len(on.ticks(2)) == 1


def test_under_lockstep_the_rank_that_all_wait_for_owes(clocked):
    on = clocked(2, "teacher.collect=lockstep")
    on.teacher()
    ask(on.rank(0))
    on.rank(1)
    assert on.ticks(21) == [(21.0, ["rank 1"])]


def test_a_declared_phase_counts_neither_for_the_rank_nor_for_those_that_wait_for_it(clocked):
    on = clocked(2, "teacher.collect=lockstep")
    on.teacher()
    ask(on.rank(0))
    late = on.rank(1)
    late.record.declare("eval", time.monotonic_ns() + int(3600e9))
    assert on.ticks(100) == []
    late.record.withdraw()
    assert len(on.ticks(21)) == 1


def test_a_declared_phase_that_is_over_counts(clocked):
    on = clocked(1)
    on.teacher()
    on.rank(0).record.declare("eval", time.monotonic_ns() - 1)
    assert len(on.ticks(21)) == 1


def test_a_declared_phase_does_not_excuse_the_teacher(clocked):
    on = clocked(1)
    on.teacher()
    rank = on.rank(0)
    rank.record.declare("eval", time.monotonic_ns() + int(3600e9))
    ask(rank)
    assert on.ticks(21) == [(21.0, ["teacher"])]


def test_nobody_waits_and_nobody_moves(clocked):
    """A deadlock in the training's own collectives."""
    on = clocked(2)
    on.teacher()
    ranks = on.rank(0), on.rank(1)
    on.ticks(15)
    ranks[0].record.at(2, 0)  # a move
    assert on.ticks(19) == []
    assert on.ticks(2) == [(2.0, ["rank 0", "rank 1"])]


def test_ranks_that_have_closed_owe_nothing(clocked):
    on = clocked(2)
    on.teacher()
    for rank in on.rank(0), on.rank(1):
        rank.close()
    assert on.ticks(200) == []


def test_a_teacher_that_loads_owes_nothing_until_startup_s(clocked):
    on = clocked(2)  # rank 1 has not attached, which can wait as well
    teacher = TeacherSession(on.token)
    teacher.record.enter(Phase.LOADING)
    on.rank(0).record.enter(Phase.BARRIER)
    assert on.ticks(200) == []


def test_a_new_teacher_has_startup_s_for_a_request_that_is_there(clocked):
    on = clocked(1)
    teacher = on.teacher()
    ask(on.rank(0))
    teacher.record.clear()
    assert [when for when, _ in on.ticks(100)] == [STARTUP_S + 1]


def test_nothing_is_owed_by_a_teacher_that_is_lost(clocked):
    """on_teacher_lost=continue: what was submitted to it stays unanswered."""
    on = clocked(1)
    teacher = on.teacher()
    rank = on.rank(0)
    ask(rank)
    teacher.record.lost = True
    for step in range(40):
        rank.record.at(step, 1)
        assert on.ticks(1) == []


def test_what_is_seen_of_a_session(clocked):
    """Who has which GPU, who is ready, when a rank moved last, and a lane whose slot was garbled."""
    on = clocked(3, "teacher.gpus=4-5", "train.gpus=0-2")
    teacher, asks, garbled = on.teacher(), on.rank(0), on.rank(1)
    for rank in asks, garbled:
        rank.record.words[RecordWord.SINCE_NS] -= int(60e9)
        ask(rank)
    garbled.ring.memory[garbled.ring.layout.request(0)] ^= 1  # its generation
    seen = snapshot.look(on.owner)
    assert [(one.who, one.gpu, one.ready) for one in seen.participants] == [
        ("teacher", "4,5", True),
        ("rank 0", "0", True),
        ("rank 1", "1", True),
        ("rank 2", "2", True),
    ]
    assert [one.still_s < 60 < one.phase_s for one in seen.ranks] == [True, False, False]
    assert [bool(lane.garbled) for lane in seen.lanes] == [False, True, False]
    teacher.record.clear()
    assert not snapshot.look(on.owner).ready
    teacher.record.lost = True
    assert snapshot.look(on.owner).ready


def test_a_missing_rank_is_due_and_then_fails_the_run(clocked, monkeypatch, tmp_path):
    """Promise 4 at the deadlines that are the defaults."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no py-spy
    on = clocked(2, "timeouts.report_s=120", "timeouts.startup_s=600")
    on.teacher()
    on.rank(0)
    child = Child(lambda: time.sleep(600))
    monkeypatch.setattr(snapshot, "processes_of", lambda view: {1: child.pid})
    try:
        assert on.ticks(121) == [(121.0, ["rank 0", "rank 1"])]
        on.ticks(479)
        assert on.monitor.overdue() is None
        on.ticks(1)
        found = cause.of_overdue(on.monitor.overdue())
        assert (found.role, found.rank, found.pid, found.status) == ("trainer", 1, child.pid, 1)
        assert found.sentence.startswith("rank 1 has not attached")
        assert "timeouts.startup_s is 10 min 00 s" in found.sentence
        assert "has not connected to the bridge" in found.traceback
    finally:
        child.end()


def test_a_missing_rank_does_not_fail_a_run_that_goes_on_without_it(clocked):
    on = clocked(2)
    on.teacher()
    rank = on.rank(0)
    for _ in range(30):
        answer(rank, ask(rank))
        assert on.ticks(5) == []
    assert on.monitor.overdue() is None


def test_no_rank_has_attached(clocked):
    on = clocked(2)
    on.teacher()
    assert on.ticks(62) == [(61.0, ["rank 0", "rank 1"])]
    assert on.monitor.overdue() is None


def test_a_kept_teacher_has_to_drain_and_to_load(clocked):
    """Between two training groups, where no rank times it."""
    on = clocked(1, "teacher.keep=true")
    teacher = on.teacher()
    on.owner.end_training()
    assert on.ticks(21) == [(21.0, ["teacher"])]
    teacher.record.enter(Phase.IDLE)
    assert on.ticks(100) == []
    teacher.record.clear()
    assert on.ticks(60) == []
    assert on.monitor.overdue() is None
    assert on.ticks(1) == [(1.0, ["teacher"])]
    found = on.monitor.overdue()
    assert (found.who.who, found.who.phase) == ("teacher", "absent")


def test_a_stopped_process_is_due(clocked):
    """While the other rank gets on."""
    on = clocked(2)
    on.teacher()
    other = on.rank(1)
    child = Child(lambda: (on.rank(0), time.sleep(600)))
    try:
        until(lambda: on.owner.lanes[0].records[0].phase is Phase.TRAINING, "the rank")
        child.kill(signal.SIGSTOP)
        until(lambda: process.state(child.pid) == "stopped", "the stop")
        found = []
        for _ in range(21):
            answer(other, ask(other))
            found += on.ticks(1)
        assert [who for _, who in found] == [["rank 0"]]
    finally:
        child.end()


def test_a_silent_process_is_due(clocked):
    on = clocked(2)
    teacher = on.teacher()
    ranks = on.rank(0), on.rank(1)
    fall_silent(ranks[1])
    teacher.record.beat()
    found = []
    for _ in range(21):
        answer(ranks[0], ask(ranks[0]))  # the others move
        found += on.ticks(1)
    assert [who for _, who in found] == [["rank 1"]]


def test_watching_asks_no_process_for_its_stacks(clocked, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(stacks, "collect", fail)
    monkeypatch.setattr(snapshot, "processes_of", fail)
    on = clocked(2)
    on.teacher()
    on.rank(0)
    assert on.ticks(30)
    assert os.getpid()
