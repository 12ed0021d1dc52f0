"""Which of the failures that were seen came first, and is the cause of the others.

Three witnesses are heard: the records, where a participant writes its own exception; torchrun's record of how its ranks
ended; and the exit status of the jobs. A PeerLost in a record is a consequence by its nature: it decides only where
no other witness has come forward within a second, or by the time that every job has ended. Of the rest the earliest
counts. A death by a hard signal is dated back by a second, because an exception in another rank may be its echo
(a lost connection) and be written before the death is seen.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from launcher.console.terminal import LAUNCHER
from launcher.hang import report as hang_report
from launcher.hang.monitor import Overdue
from launcher.plan import placement
from launcher.plan.jobs import TEACHER, TORCHRUN
from launcher.process.job import Exit, Job
from shmbridge.shm.record import Failure
from shmbridge.shm.session import MappedSession

_HARD_DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_ECHO_NS = 1_000_000_000
_PATIENCE_NS = 1_000_000_000

TRAINER = "trainer"


class Cause(msgspec.Struct, frozen=True):
    """One failure, and how its process ended where that is known."""

    role: str  # launcher, teacher, trainer or torchrun
    rank: int  # of a trainer; of a teacher the replica
    who: str  # as people are told: rank 1, teacher, teacher 1, torchrun
    pid: int
    reason: str
    status: int  # for the launcher's own exit code
    at_ns: int  # CLOCK_MONOTONIC
    signal: int | None = None  # that ended the process; None where it raised or exited
    phase: str = ""
    elapsed_s: float | None = None  # in that phase
    step: int | None = None
    sequence: int | None = None
    traceback: str = ""

    @property
    def sentence(self) -> str:
        """`rank 1 was killed by SIGKILL`, `teacher failed with ValueError: ...`; one line."""
        line = self.reason.split("\n")[0]
        verb = (
            "was "
            if line.startswith("killed")
            else ""
            if line.startswith(("exited", "has not", "is not"))
            else "failed: "
        )
        return f"{self.who} {verb}{line}"

    def as_failure(self) -> Failure:
        """For the owner's record, so that everyone stops with this cause."""
        return Failure(
            role=self.role,
            rank=self.rank,
            pid=self.pid,
            phase=self.phase or "unknown",
            step=self.step,
            sequence=self.sequence,
            reason=self.reason,
            traceback=self.traceback,
            at_ns=self.at_ns,
            status=self.status,
        )


def find(
    jobs: Sequence[Job],
    view: MappedSession | None,
    record: Path | None = None,
    ended_ns: Mapping[int, int] = {},
    oom_kills: int | None = None,
    excused: Collection[int] = (),
    roles: Collection[str] | None = None,
) -> Cause | None:
    """The first failure of a run, or None.

    Args:
        jobs: of the run; one that was asked to end is no witness.
        view: of the session, for its records. None where the bridge is off.
        record: elastic.py's file; it may not exist.
        ended_ns: when ranks were seen to end, by rank.
        oom_kills: how many processes the kernel has killed for want of memory; None where that is unknown.
        excused: replicas that are no witnesses.
        roles: of the participants whose records count. None: all.
    """
    recorded = [failure for failure in (view.failures() if view else []) if roles is None or failure.role in roles]
    jobs = [job for job in jobs if job.spec.replica not in excused]
    recorded = [failure for failure in recorded if failure.role != TEACHER or failure.rank not in excused]
    first = _read_record(record) if record else None
    spoke = {(failure.role, failure.rank) for failure in recorded}
    count = len(view.control.teachers) if view else 0
    causes = [_raised(failure, jobs, first, count) for failure in recorded if not failure.consequence]
    if first and (TRAINER, first["local_rank"]) not in spoke:
        causes.append(_of_rank(first, ended_ns, oom_kills))
    spoken: set[int | None] = {rank if role == TEACHER else None for role, rank in spoke}  # None: training
    silent = [job for job in jobs if job.spec.replica not in (spoken | {None} if first else spoken)]
    causes += [of_exit(job, job.exit, oom_kills) for job in silent if job.exit and job.died]
    if not causes:
        settled_ns = time.monotonic_ns() - (_PATIENCE_NS if any(job.alive for job in jobs) else 0)
        causes = [_raised(failure, jobs, first, count) for failure in recorded if failure.at_ns <= settled_ns]
    found = min(causes, key=_order, default=None)
    return found and _located(found, view)


def of_launcher(reason: str, status: int) -> Cause:
    """A failure that this process has found."""
    return Cause(LAUNCHER, 0, LAUNCHER, os.getpid(), reason, status, time.monotonic_ns())


def describe_exit(code: int | None, number: int | None, oom_kills: int | None) -> str:
    """`exited with code 7`, `killed by SIGSEGV`, or `killed by SIGKILL, likely out of memory`.

    `oom_kills`: processes that the kernel killed for lack of memory, by the cgroup's counter; None where it cannot be read. With 0
    the last part is left out.
    """
    if number is None:
        return f"exited with code {code}"
    name = signal.Signals(number).name if number in signal.Signals.__members__.values() else f"signal {number}"
    return f"killed by {name}" + (", likely out of memory" if number == signal.SIGKILL and oom_kills != 0 else "")


def _raised(failure: Failure, jobs: Sequence[Job], first: dict[str, Any] | None, teachers: int) -> Cause:
    """The cause that a process has recorded itself. A teacher without a job here is a keeper's: its record gives the exit status."""
    status, who = failure.status, f"rank {failure.rank}"
    if failure.role == LAUNCHER:
        who = LAUNCHER
    elif failure.role == TEACHER:
        job = next((job for job in jobs if job.spec.replica == failure.rank), None)
        who = placement.teacher_name(failure.rank, teachers)
        status = job.exit.status if job and job.exit and not job.asked else failure.status
    elif first and first["local_rank"] == failure.rank:
        status = first["exitcode"]
    return Cause(
        role=failure.role,
        rank=failure.rank,
        who=who,
        pid=failure.pid,
        reason=failure.reason,
        status=status if status > 0 else 1,
        at_ns=failure.at_ns,
        phase=failure.phase,
        step=failure.step,
        sequence=failure.sequence,
        traceback=failure.traceback,
    )


def _of_rank(first: dict[str, Any], ended_ns: Mapping[int, int], oom_kills: int | None) -> Cause:
    """A rank that ended without a failure in its record."""
    code, rank = first["exitcode"], first["local_rank"]
    number = -code if code < 0 else None
    at_ns = ended_ns.get(rank, time.monotonic_ns() - int((time.time() - first["timestamp"] - 1) * 1e9))
    reason = describe_exit(code, number, oom_kills)
    status = code if number is None else 128 + number
    return Cause(
        TRAINER, rank, f"rank {rank}", first["pid"], reason, status, at_ns, number, traceback=first["traceback"]
    )


def of_exit(job: Job, ended: Exit, oom_kills: int | None) -> Cause:
    """A job's own end as a failure."""
    role = TORCHRUN if job.spec.replica is None else TEACHER
    reason = describe_exit(ended.code, ended.signal, oom_kills)
    who, rank = job.spec.who, job.spec.replica or 0
    return Cause(role, rank, who, job.first_pid, reason, ended.status, ended.at_ns, ended.signal)


def of_overdue(overdue: Overdue) -> Cause:
    """A rank that has not attached, or a kept teacher that is not ready, with its stack."""
    late, stack = overdue.who, hang_report.traceback(overdue.who)
    now_ns = time.monotonic_ns()
    return Cause(late.role, late.rank, late.who, late.pid, overdue.reason, 1, now_ns, phase=late.phase, traceback=stack)


def _located(cause: Cause, view: MappedSession | None) -> Cause:
    """Add from the record where the participant was; one that was killed could not write it into its failure."""
    if view is None or cause.role not in (TEACHER, TRAINER):
        return cause
    record = view.control.teachers[cause.rank] if cause.role == TEACHER else view.lanes[cause.rank].records[0]
    if record.identity is None:
        return cause
    since_s = (time.monotonic_ns() - cause.at_ns) / 1e9
    place: dict[str, Any] = {"pid": record.identity.pid, "elapsed_s": max(0.0, record.seconds_in_phase - since_s)}
    if not cause.phase:
        place |= {"phase": str(record.phase), "step": record.step, "sequence": record.sequence}
    return msgspec.structs.replace(cause, **place)


def _order(cause: Cause) -> int:
    return cause.at_ns - (_ECHO_NS if cause.signal in _HARD_DEATHS else 0)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        first = json.loads(path.read_text())["first"]
    except (OSError, ValueError, KeyError):
        return None
    return first if isinstance(first, dict) else None
