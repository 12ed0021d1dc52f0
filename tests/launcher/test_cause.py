"""Which failure is the cause: what the witnesses say, and when a consequence alone may decide."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.planning.jobs import TEACHER, TORCHRUN
from launcher.process.job import Exit
from launcher.supervisor import cause
from shmbridge import config
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Failure

NOWHERE = Path("/nowhere/failures.json")


@pytest.fixture
def session() -> Iterator[Owner]:
    with Owner(config.load(overrides=["ring.max_tokens=64"]), lanes=2) as owner:
        owner.start_generation()
        yield owner


def jobs(alive: bool = True) -> list[SimpleNamespace]:
    """Two jobs that either run or have ended when they were asked to."""
    specs = [SimpleNamespace(who=TEACHER, replica=0), SimpleNamespace(who=TORCHRUN, replica=None)]
    return [SimpleNamespace(spec=spec, alive=alive, exit=None, died=False, asked=True) for spec in specs]


def write(session: Owner, rank: int, reason: str, seconds_ago: float = 0.0, consequence: bool = True) -> None:
    at_ns = time.monotonic_ns() - int(seconds_ago * 1e9)
    failure = Failure("trainer", rank, 1, "waiting", None, None, reason, consequence=consequence, at_ns=at_ns)
    session.lanes[rank].records[0].relay(failure)


def find(session: Owner, alive: bool = True) -> cause.Cause | None:
    return cause.find(jobs(alive), session, lambda: 0, record=NOWHERE)  # type: ignore[arg-type]


def test_a_fresh_consequence_waits_for_a_better_witness(session):
    write(session, 0, "TeacherDied: gone")
    assert find(session) is None


def test_a_consequence_that_stays_alone_decides(session):
    write(session, 0, "TeacherDied: gone", seconds_ago=2.0)
    found = find(session)
    assert found and found.reason == "TeacherDied: gone"


def test_a_consequence_decides_where_no_witness_is_left(session):
    write(session, 0, "TeacherDied: gone")
    assert find(session, alive=False)


def test_a_cause_needs_no_patience_and_goes_before_an_earlier_consequence(session):
    write(session, 0, "TrainerDied: rank 1 failed", seconds_ago=2.0)
    write(session, 1, "RuntimeError: boom", consequence=False)
    found = find(session)
    assert found and (found.rank, found.reason) == (1, "RuntimeError: boom")


def test_a_hard_death_goes_before_an_exception_that_may_be_its_echo(session):
    """A rank's connection breaks, and the rank says so, before the death of the teacher is seen."""
    write(session, 0, "RuntimeError: connection reset", seconds_ago=0.5, consequence=False)
    teacher, torchrun = jobs()
    teacher.exit, teacher.died, teacher.asked = Exit(None, signal.SIGKILL, 0, time.monotonic_ns()), True, False
    teacher.first_pid = 1
    found = cause.find([teacher, torchrun], session, lambda: 0)  # type: ignore[list-item]
    assert found and (found.role, found.signal) == (TEACHER, signal.SIGKILL)
