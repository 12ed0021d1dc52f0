"""The root-cause report: one message on the terminal, the same with more about the machine as text and as JSON in the run
directory."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from launcher.console.terminal import LAUNCHER, Console
from launcher.console.text import seconds, size, table
from launcher.doctor import command as doctor
from launcher.doctor import host
from launcher.doctor.checks import Fact, gather
from launcher.planning.jobs import TEACHER, TORCHRUN, Plan
from launcher.process.job import Exit
from launcher.supervisor.cause import TRAINER, UNKNOWN, Cause
from launcher.supervisor.loop import EventLoop
from shmbridge.shm.participant_record import Phase

_SHOW_S = 5.0
_MACHINE_S = 2.0  # a name server that does not answer must not hold up a report


class Report(msgspec.Struct, frozen=True):
    """What the user is told of a failed run, as report.json holds it."""

    cause: Cause
    gpu: str
    elapsed_s: float  # of the run
    exit_code: int
    memory: str  # about a death that may have been for want of memory, else empty
    log_of: str  # whose log tells most: its own, or torchrun's for a rank that has none here
    log: list[str]  # the last traceback in it, and the last lines where they came later
    log_paths: list[str]
    action: str
    path: str  # of this report as text
    machine: list[Fact] = []  # what `shmbridge-launch doctor` finds without starting a process

    def __str__(self) -> str:
        """With every fact of the machine."""
        return self.text(self.machine)

    def text(self, machine: Sequence[Fact]) -> str:
        """As people read it, with some facts of the machine."""
        cause = self.cause
        stood = "" if cause.elapsed_s is None else f" for {seconds(cause.elapsed_s)}"
        where = [
            "" if cause.phase == UNKNOWN else f"phase {cause.phase}{stood}",
            "" if cause.step is None else f"step {cause.step}",
            "" if cause.sequence is None else f"sequence {cause.sequence}",
        ]
        facts = {
            "who": f"{cause.who}, pid {cause.pid or 'unknown'}" + (f", GPU {self.gpu}" if self.gpu else ""),
            "where": ", ".join(filter(None, where)),
            "ended": cause.reason if cause.signal else f"exit code {cause.status}",
            "memory": self.memory,
        }
        parts = [
            f"\nThe run failed after {seconds(self.elapsed_s)}: {cause.sentence}\n",
            table([(name, fact) for name, fact in facts.items() if fact]),
        ]
        if cause.traceback:
            parts.append(_quoted("its traceback", cause.traceback))
        elif "\n" in cause.reason:
            parts.append(_quoted("the whole reason", cause.reason))
        elif self.log:
            parts.append(_quoted(f"the end of its log ({self.log_of})", "\n".join(self.log)))
        if machine:
            title = "this machine (shmbridge-launch doctor also looks at the GPUs)"
            parts.append(f"\n  {title}\n{doctor.page(machine, margin=4)}")
        logs = [("log" if i == 0 else "", path) for i, path in enumerate(self.log_paths)]
        parts.append("\n" + table([("next", self.action), *logs, ("report", self.path)]))
        return "\n".join(parts)


def conclude(cause: Cause, plan: Plan, loop: EventLoop, elapsed_s: float, directory: Path) -> int:
    """Report the failure of a launcher whose jobs have ended: in `directory`, and on stderr after what the console still has to
    show, there only with what is not ok of the machine. The exit code."""
    replica = cause.rank if cause.role == TEACHER else None
    ended = next((job.exit for job in loop.jobs.values() if job.spec.replica == replica), None)
    oom_kills = loop.oom_kills() if cause.signal == signal.SIGKILL else None
    # Where train.torchrun_args has log flags of its own, what the ranks print is torchrun's output, or in files elsewhere.
    log_of = TORCHRUN if cause.role == TRAINER and not loop.logs.paths(cause.who) else cause.who
    log = [] if cause.traceback else loop.logs.last_lines(log_of)
    raised = loop.logs.raised(log_of) if log_of == cause.who and cause.reason == "exited with code 1" else ""
    if raised:  # before the process had a record for it, as in a script's imports before connect()
        cause = msgspec.structs.replace(cause, reason=f"{cause.reason}: {raised}")
    report = Report(
        cause=cause,
        gpu=_gpu(cause, plan),
        elapsed_s=elapsed_s,
        exit_code=cause.status,
        memory=_memory(ended, oom_kills) if cause.signal == signal.SIGKILL else "",
        log_of=log_of,
        log=log,
        log_paths=[str(path) for path in loop.logs.paths(log_of)],
        action=_action(cause, oom_kills),
        path=str(directory / "report.txt"),
        machine=gather(host.CHECKS, _MACHINE_S),
    )
    (directory / "report.txt").write_text(f"{report}\n")
    (directory / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    loop.console.flush(_SHOW_S)
    errors = Console(sys.stderr)
    errors.page(report.text([fact for fact in report.machine if fact.status != "ok"]))
    errors.flush(_SHOW_S)
    return report.exit_code


def _quoted(title: str, text: str) -> str:
    return f"\n  {title}\n" + "\n".join(f"    {line}".rstrip() for line in text.rstrip().split("\n"))


def _gpu(cause: Cause, plan: Plan) -> str:
    if cause.role == TEACHER:
        return ",".join(str(gpu.number) for gpu in plan.teachers[cause.rank])
    if cause.role == TRAINER and cause.rank < len(plan.train_gpus):
        return str(plan.train_gpus[cause.rank].number)
    return ""


def _memory(ended: Exit | None, oom_kills: int | None) -> str:
    """What the kernel counted, and how large the job had grown."""
    counted = "the cgroup's oom_kill counter " + ("is not readable" if oom_kills is None else f"rose by {oom_kills}")
    peak = f"; the largest process of the job had {size(ended.peak_rss)} (peak RSS)" if ended else ""
    return counted + peak


def _action(cause: Cause, oom_kills: int | None) -> str:
    if cause.role == LAUNCHER:
        return "See above; the log of every job is in the run directory."
    if cause.signal == signal.SIGKILL and cause.role == TORCHRUN:
        return "Find out who killed torchrun; training ended with it."
    if cause.signal == signal.SIGKILL and oom_kills == 0:
        return "Find out who or what sent SIGKILL (a user, the batch system): the kernel's out-of-memory killer counted nothing."
    if cause.signal == signal.SIGKILL:
        return "See `dmesg` for the kernel's reason; use less memory, or raise the limit."
    if cause.signal:
        return "A crash in native code: run with PYTHONFAULTHANDLER=1 to see the stack."
    if cause.role == TEACHER and cause.phase in (str(Phase.STARTING), str(Phase.LOADING), str(Phase.PROBING), UNKNOWN):
        return "Correct teacher.model or its settings; nothing was trained."
    if "ParityError: parity check, vocabulary" in cause.reason:
        return "Take a student with the teacher's vocabulary, or cut the padding as the message says."
    if cause.traceback:
        return "Correct what the traceback tells."
    return "Its log tells why it ended."
