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
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from launcher.console.terminal import LAUNCHER
from launcher.hang import report as hang_report
from launcher.hang.monitor import Overdue
from launcher.planning import placement
from launcher.planning.jobs import TEACHER, TORCHRUN
from launcher.process.job import Exit, Job
from shmbridge.shm.participant_record import Failure
from shmbridge.shm.session import MappedSession

_HARD_DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_ECHO_NS = 1_000_000_000
_PATIENCE_NS = 1_000_000_000

TRAINER = "trainer"
UNKNOWN = "unknown"  # phase

# How many processes the kernel has killed for want of memory; None where that is unknown. It is read only where it is needed.
OomKills = Callable[[], int | None]


class Cause(Failure, frozen=True, kw_only=True):
    """A failure as people are told of it, and how its process ended where that is known. Its role may also be torchrun."""

    who: str  # rank 1, teacher, teacher 1, torchrun
    phase: str = UNKNOWN
    step: int | None = None
    sequence: int | None = None
    signal: int | None = None  # that ended the process; None where it raised or exited
    elapsed_s: float | None = None  # in its phase

    @property
    def sentence(self) -> str:
        """`rank 1 was killed by SIGKILL`, `teacher failed: ValueError: ...`; one line."""
        line = self.reason.split("\n")[0]
        if line.startswith("killed"):
            return f"{self.who} was {line}"
        return (
            f"{self.who} {line}" if line.startswith(("exited", "has not", "is not")) else f"{self.who} failed: {line}"
        )


def find(
    jobs: Sequence[Job],
    view: MappedSession | None,
    oom_kills: OomKills,
    *,
    record: Path | None = None,
    ended_ns: Mapping[int, int] = {},
    excused: Collection[int] = (),
    teachers_alone: bool = False,
) -> Cause | None:
    """The first failure of a run, or None.

    Args:
        jobs: of the run; one that was asked to end is no witness.
        view: of the session, for its records. None where the bridge is off.
        oom_kills: of the run.
        record: elastic.py's file; it may not exist.
        ended_ns: when ranks were seen to end, by rank.
        excused: replicas that are no witnesses.
        teachers_alone: of the records only the teachers' count.
    """
    jobs = [job for job in jobs if job.spec.replica not in excused]
    failures = [
        failure
        for failure in (view.failures() if view else [])
        if (failure.rank not in excused if failure.role == TEACHER else not teachers_alone)
    ]
    first = _read_record(record) if record else None
    teachers = len(view.control.teachers) if view else 0
    causes = [_raised(failure, jobs, first, teachers) for failure in failures if not failure.consequence]
    if first and (TRAINER, first["local_rank"]) not in {(failure.role, failure.rank) for failure in failures}:
        causes.append(_of_rank(first, ended_ns, oom_kills))
    # None: training, of whose end its ranks tell more than torchrun's exit.
    heard = {failure.rank if failure.role == TEACHER else None for failure in failures} | ({None} if first else set())
    causes += [of_job(job, oom_kills) for job in jobs if job.died and job.spec.replica not in heard]
    if not causes:
        settled_ns = time.monotonic_ns() - (_PATIENCE_NS if any(job.alive for job in jobs) else 0)
        causes = [_raised(failure, jobs, first, teachers) for failure in failures if failure.at_ns <= settled_ns]
    found = min(causes, key=lambda cause: cause.at_ns - _ECHO_NS * (cause.signal in _HARD_DEATHS), default=None)
    return found and _located(found, view)


def of_launcher(reason: str, status: int) -> Cause:
    """A failure that this process has found."""
    me, now_ns = os.getpid(), time.monotonic_ns()
    return Cause(role=LAUNCHER, rank=0, who=LAUNCHER, pid=me, reason=reason, status=status, at_ns=now_ns)


def of_overdue(overdue: Overdue) -> Cause:
    """A rank that has not attached, or a kept teacher that is not ready, with its stack."""
    late = overdue.who
    return Cause(
        role=late.role,
        rank=late.rank,
        who=late.who,
        pid=late.pid,
        reason=overdue.reason,
        phase=late.phase,
        at_ns=time.monotonic_ns(),
        traceback=hang_report.stack([late]),
    )


def of_job(job: Job, oom_kills: OomKills) -> Cause:
    """A failure of a job that has ended."""
    assert job.exit
    role = TORCHRUN if job.spec.replica is None else TEACHER
    return _of_exit(role, job.spec.replica or 0, job.spec.who, job.first_pid, job.exit, oom_kills)


def _of_exit(role: str, rank: int, who: str, pid: int, ended: Exit, oom_kills: OomKills, traceback: str = "") -> Cause:
    """`exited with code 7`, `killed by SIGSEGV`, or `killed by SIGKILL, likely out of memory`: the last part is left out where the
    kernel has counted no such kill."""
    reason, number = f"exited with code {ended.code}", ended.signal
    if number is not None:
        name = signal.Signals(number).name if number in signal.Signals.__members__.values() else f"signal {number}"
        memory = ", likely out of memory" if number == signal.SIGKILL and oom_kills() != 0 else ""
        reason = f"killed by {name}{memory}"
    return Cause(
        role=role,
        rank=rank,
        who=who,
        pid=pid,
        reason=reason,
        status=ended.status,
        at_ns=ended.at_ns,
        signal=number,
        traceback=traceback,
    )


def _of_rank(first: dict[str, Any], ended_ns: Mapping[int, int], oom_kills: OomKills) -> Cause:
    """A rank that ended without a failure in its record."""
    code, rank = first["exitcode"], first["local_rank"]
    # torchrun's time has whole seconds.
    at_ns = ended_ns.get(rank, time.monotonic_ns() - int((time.time() - first["timestamp"] - 1) * 1e9))
    ended = Exit(code if code >= 0 else None, -code if code < 0 else None, 0, at_ns)
    return _of_exit(TRAINER, rank, f"rank {rank}", first["pid"], ended, oom_kills, first["traceback"])


def _raised(failure: Failure, jobs: Sequence[Job], first: dict[str, Any] | None, teachers: int) -> Cause:
    """The cause that a process has recorded itself. A teacher without a job here is a keeper's: its record gives the exit status."""
    status, who = failure.status, LAUNCHER if failure.role == LAUNCHER else f"rank {failure.rank}"
    if failure.role == TEACHER:
        job = next((job for job in jobs if job.spec.replica == failure.rank), None)
        who = placement.teacher_name(failure.rank, teachers)
        status = job.exit.status if job and job.exit and not job.asked else failure.status
    elif failure.role == TRAINER and first and first["local_rank"] == failure.rank:
        status = first["exitcode"]
    # Whoever is told of it is to stop with it: it decides, and for all of the session.
    told = {"status": status if status > 0 else 1, "consequence": False, "generation": 0}
    return Cause(**msgspec.structs.asdict(failure) | told, who=who)


def _located(cause: Cause, view: MappedSession | None) -> Cause:
    """Add from the record where the participant was; one that was killed could not write it into its failure."""
    if view is None or cause.role not in (TEACHER, TRAINER):
        return cause
    record = view.control.teachers[cause.rank] if cause.role == TEACHER else view.lanes[cause.rank].records[0]
    if record.identity is None:
        return cause
    since_s = (time.monotonic_ns() - cause.at_ns) / 1e9
    place: dict[str, Any] = {"pid": record.identity.pid, "elapsed_s": max(0.0, record.seconds_in_phase - since_s)}
    if cause.phase == UNKNOWN:
        place |= {"phase": str(record.phase), "step": record.step, "sequence": record.sequence}
    return msgspec.structs.replace(cause, **place)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        first = json.loads(path.read_text())["first"]
    except (OSError, ValueError, KeyError):
        return None
    return first if isinstance(first, dict) else None
