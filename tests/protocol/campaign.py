"""kill -9 at every point of the protocol, as SQLite tests its journal: n = 1, 2, 3 ... until a run is clean.

    python -m tests.protocol.campaign --victim teacher --scenario whole

One side is a forked process, the victim; the other, the survivor, runs here, and so does the owner. Memory, semaphores and
liveness are the real ones. A point is one line of a module in TRACED, executed by the victim; sys.settrace counts them, so they
cost nothing outside this module.

The two sides take turns: one moves until it would sleep, and hands the turn over through a pipe; when it gets the turn back
and was rung meanwhile, it goes through the real sleep. So every run with the same n is the same run. Where both would sleep
and neither was rung, a ring was lost: a violation here, though a slice would heal it.

With `--pause` the victim is not killed at point n; the survivor moves as far as it can instead, then the victim goes on.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from shmbridge.errors import DeadlineExceeded, PeerLost
from shmbridge.shm import (
    doorbell,
    layout,
    owner,
    participant_record,
    rank_session,
    ring,
    segment,
    session,
    teacher_session,
)
from shmbridge.shm.doorbell import Doorbell
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import Participant, Token
from shmbridge.shm.teacher_session import TeacherSession
from tests.protocol import actors, mutants
from tests.protocol.actors import FAILS, OFFER, Broken, TinyRank, TinyTeacher, Witness, exchange_afresh, require

SLICE_S = 0.001  # of the survivor, so that it notices a death at once
PATIENCE_S = 10.0
REACHED = 7  # exit status of a victim that was paused
MOST_IDLE = 10  # turns in a row in which a side was not rung
PROTOCOL = (layout, ring, doorbell, participant_record, session, teacher_session, rank_session, segment)
TRACED = {module.__file__ for module in PROTOCOL}


# What the rank does; the teacher serves it.


def whole(rank: TinyRank) -> None:
    """Replies read out of order, one that nobody wants, one that raised."""
    first, second = rank.submit(), rank.submit()
    rank.wait(second)
    rank.read(second)
    rank.take(first)
    rank.ring.release(second)
    unwanted, failing = rank.submit(), rank.submit(FAILS)
    rank.abandon(unwanted)
    rank.wait(unwanted)
    rank.ring.release(unwanted)
    rank.wait(failing)
    rank.read(failing, error=True)
    rank.ring.release(failing)
    rank.take(rank.submit())


def streamed(rank: TinyRank) -> None:
    """Replies in chunks: one read to its end, one abandoned after its first chunk, one that raised, one more."""
    first, second = rank.submit(), rank.submit()
    for part in range(actors.CHUNKS_OF_A_REPLY):
        rank.chunk(first, part)
    rank.take(first)
    third = rank.submit(FAILS)
    rank.chunk(second, 0)
    rank.abandon(second)
    rank.wait(second)
    rank.ring.release(second)
    rank.wait(third)
    rank.read(third, error=True)
    rank.ring.release(third)
    fourth = rank.submit()
    for part in range(actors.CHUNKS_OF_A_REPLY):
        rank.chunk(fourth, part)
    rank.take(fourth)


class Scenario(NamedTuple):
    """What the rank does, in a session with so many chunks. `attach`: points begin at the attach, not at the open barrier."""

    body: Callable[[TinyRank], None]
    chunks: int
    attach: bool


SCENARIOS = {"whole": Scenario(whole, 0, attach=True), "streamed": Scenario(streamed, 2, attach=False)}


class Turns:
    """One of the two sides moves, the other waits for its turn. A side that has ended, or died, is not waited for."""

    def __init__(self, reads: int, writes: int, during: Callable[[], None] = lambda: None) -> None:
        self._reads, self._writes = reads, writes
        self._during = during  # called at the begin of every turn, by the survivor
        self.alone = False
        self.complaint = ""

    def take(self) -> None:
        """Sleep until the other side hands the turn over or is no more."""
        if not self.alone:
            if not select.select([self._reads], [], [], PATIENCE_S)[0]:
                raise Broken("the other side hangs: it sleeps and was not rung")
            token = os.read(self._reads, 1)
            if token != b".":
                self.alone = True
                while token:
                    self.complaint += token.decode(errors="replace")
                    token = os.read(self._reads, 4096)
        self._during()

    def hand_over(self) -> None:
        if not self.alone:
            try:
                os.write(self._writes, b".")
            except BrokenPipeError:
                self.alone = True

    def complain(self, text: str) -> None:
        os.write(self._writes, b"!" + text.encode())

    def wrapped(self, ready: Callable[[], Any], bell: Doorbell) -> Callable[[], Any]:
        """`ready`, which hands the turn over before a sleep, again and again until this side was rung."""

        def look() -> Any:
            value = ready()
            idle = 0
            while value is None and not self.alone:
                self.hand_over()
                self.take()
                if bell._semaphore.value:
                    break
                idle += 1
                require(idle < MOST_IDLE, "both sides sleep: a ring was lost")
            if value is None and self.alone:
                self._during()
            return value

        return look

    def close(self) -> None:
        os.close(self._reads)
        os.close(self._writes)


def taking_turns(session: Participant, turns: Turns) -> Any:
    """The session, which hands its turn over before each sleep."""
    wait = session.wait
    session.wait = lambda ready, *rest: wait(turns.wrapped(ready, session.bell), *rest)
    return session


class Points:
    """A tracer that does something at the n-th point."""

    def __init__(self, n: int, act: Callable[[], None]) -> None:
        self._left = n
        self._act = act
        self.passed: set[str] = set()  # names of the functions that it has counted in

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._count if frame.f_code.co_filename in TRACED else None

    def _count(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._left -= 1
            self.passed.add(frame.f_code.co_qualname)
            if self._left == 0:
                self._act()
        return self._count

    @property
    def reached(self) -> bool:
        return self._left <= 0


def play(
    role: str,
    token: Token,
    turns: Turns,
    scenario: str,
    timeout_s: float,
    seen: list[Any],
    points: Points | None = None,
) -> None:
    """One side from attach to close. What it is made of is appended to `seen`; the victim has `points`."""
    body, _, attach = SCENARIOS[scenario]
    if attach:
        sys.settrace(points)
    if role == "teacher":
        teacher = TinyTeacher(taking_turns(TeacherSession(token), turns))
        seen.append(teacher)
        teacher.open()
        sys.settrace(points)
        teacher.serve()
    else:
        rank = TinyRank(taking_turns(RankSession(token, 0), turns))
        seen.append(rank)
        rank.open(timeout_s)
        sys.settrace(points)
        body(rank)
        rank.session.close()
    sys.settrace(None)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Run:
    """One session, one victim that is killed (or paused) at point n, and its survivor."""

    def __init__(self, victim: str, scenario: str, n: int, pause: bool = False) -> None:
        self.victim, self.scenario, self.n, self.pause = victim, scenario, n, pause
        self.survivor = "rank" if victim == "teacher" else "teacher"
        self.violations: list[str] = []
        self.status: int | None = None

    def __call__(self) -> Run:
        chunks = SCENARIOS[self.scenario].chunks
        self.owner = Owner(actors.settings(chunks=chunks), 1)
        try:
            self._guard("run", self._run)
        finally:
            self.owner.close()
        self._guard("clean-up", lambda: require(not owner.objects(self.owner.session_id), "left in /dev/shm"))
        return self

    def _guard(self, where: str, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            self.violations.append(f"{where}: {type(error).__name__}: {error} ({at.filename}:{at.lineno})")

    def _run(self) -> None:
        token = self.owner.start_generation()
        self.witness = Witness(self.owner.lanes[0].ring)
        to_victim, to_survivor = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(to_victim[1]), os.close(to_survivor[0])
            self._be_the_victim(token, Turns(to_victim[0], to_survivor[1]))
        os.close(to_victim[0]), os.close(to_survivor[1])
        turns = Turns(to_survivor[0], to_victim[1], self._during)
        self.turns = turns
        seen: list[Any] = []
        try:
            self._guard("survivor", lambda: self._survive(token, turns, seen))
        finally:
            turns.close()
            self._reap(patient=not self.violations)
        self.witness.look()
        if turns.complaint:
            self.violations.append(f"victim: {turns.complaint}")
        elif self.status not in (0, REACHED if self.pause else -signal.SIGKILL) and not self.violations:
            self.violations.append(f"the victim ended with {self.status}")
        if not self.violations:
            self._guard("a fresh generation", lambda: exchange_afresh(self.owner))

    def _be_the_victim(self, token: Token, turns: Turns) -> None:
        code = 1
        try:
            gc.disable()
            doorbell.SLICE_S = 3600.0  # it is woken by rings alone, so that its points do not depend on the clock
            points = Points(self.n, self._pauser(turns) if self.pause else _die)
            play(self.victim, token, turns, self.scenario, PATIENCE_S, [], points)
            code = REACHED if points.reached else 0
            if not points.reached:
                print("passed", *sorted(points.passed), flush=True)
        except BaseException as error:
            sys.settrace(None)
            turns.complain("".join(traceback.format_exception(error)))
        finally:
            os._exit(code)

    @staticmethod
    def _pauser(turns: Turns) -> Callable[[], None]:
        def act() -> None:
            turns.hand_over()
            turns.take()

        return act

    def _during(self) -> None:
        """At the begin of every turn of the survivor: the owner's moves, and a look at the cursors."""
        self.witness.look()
        control = self.owner.control
        if control.replies_ready != self.owner.generation and control.teachers[0].phase is Phase.OFFERED:
            self.owner.create_replies(OFFER)
        if self.turns.alone:
            self._reap(patient=True)
            if self.survivor == "teacher" and self.owner.lanes[0].records[0].identity is None:
                self.owner.end_session()  # the launcher's word: a teacher cannot miss a rank that never came

    def _survive(self, token: Token, turns: Turns, seen: list[Any]) -> None:
        turns.take()
        never_came = turns.alone and self.owner.control.teachers[0].identity is None
        try:
            play(self.survivor, token, turns, self.scenario, 0.0 if never_came else PATIENCE_S, seen)
        except PeerLost as error:
            require(self.status == -signal.SIGKILL, f"{error!r}, and nobody died: {self.status}")
            require(f"pid {self.pid}" in str(error), f"{error!r} does not name pid {self.pid}")
            self._owes_nothing(seen)
        except DeadlineExceeded as error:
            require(never_came and "has not attached" in str(error), f"a hang: {error!r}")

    def _owes_nothing(self, seen: list[Any]) -> None:
        """A survivor that gave up was owed nothing more by what is in shared memory."""
        ring = self.owner.lanes[0].ring
        if self.survivor == "teacher":
            sent = seen and seen[0]._sent
            require(ring.replied == ring.requested or sent is not None, "a submitted request was not looked at")
        elif seen[0].waits_for is not None:
            require(not ring.answered(seen[0].waits_for), "an answered request was given up")

    def _reap(self, patient: bool) -> None:
        if self.status is not None:
            return
        pidfd = os.pidfd_open(self.pid)
        ended = select.select([pidfd], [], [], PATIENCE_S if patient else 0)[0]
        os.close(pidfd)
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
            self.violations.append("the victim hangs")
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Result(NamedTuple):
    points: int
    violations: list[str]
    seconds: float

    def __str__(self) -> str:
        return f"{self.points} points, {len(self.violations)} violations, {self.seconds:.1f} s"


def run(
    victim: str,
    scenario: str,
    *,
    pause: bool = False,
    stride: int = 1,
    most_violations: int = 5,
) -> Result:
    """Every point of the victim, in steps of `stride`; stops early once there are `most_violations`."""
    assert "torch" not in sys.modules, "a child must fork cheaply"
    doorbell.SLICE_S = SLICE_S
    began = time.monotonic()
    violations: list[str] = []
    n, points = 1, 0
    gc.collect()
    gc.freeze()
    while True:
        done = Run(victim, scenario, n, pause)()
        violations += [
            f"{victim} {'paused' if pause else 'killed'} at point {n}, {scenario}: {v}" for v in done.violations
        ]
        if done.status == 0 or len(violations) >= most_violations:
            break
        points += 1
        n += stride
    return Result(points, violations, time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.protocol.campaign", description=__doc__)
    parser.add_argument("--victim", choices=["teacher", "rank"], required=True)
    parser.add_argument("--scenario", choices=list(SCENARIOS), required=True)
    parser.add_argument("--pause", action="store_true")
    parser.add_argument("--stride", type=int, default=1, help="points from one victim to the next")
    parser.add_argument("--mutant", choices=list(mutants.MUTANTS), help="break the protocol first")
    args = parser.parse_args()
    if args.mutant:
        mutants.MUTANTS[args.mutant](setattr)
    most = 1 if args.mutant else 5
    result = run(args.victim, args.scenario, pause=args.pause, stride=args.stride, most_violations=most)
    print(*result.violations, f"{args.victim}, {args.scenario}: {result}", sep="\n")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
