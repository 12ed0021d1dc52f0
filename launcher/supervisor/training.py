"""The training job of a run, one torchrun for each generation, and how the run ends.

    STARTING -> RUNNING -> DONE        it ends with 0: the teachers are told, drain and end by themselves
                        -> CRASHED     and may begin again: RUNNING, in a generation of its own, once the teachers have drained
                        -> FAILED      the cause goes into the owner's record, so that everyone stops with it; then the jobs are ended
                        -> STOPPED     SIGINT or SIGTERM goes on to each rank (SIGHUP as SIGTERM), so that the script's own handlers
                                       save; the teachers serve until the last rank has ended

Whichever comes first decides the exit code. Whatever still runs one grace (timeouts.shutdown_s) after the ranks were sent their
signal is killed with SIGKILL.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from launcher.console.terminal import LAUNCHER
from launcher.console.text import listed, seconds
from launcher.exit_codes import REFUSED
from launcher.hang.monitor import Monitor
from launcher.planning.jobs import TEACHER, JobSpec, Plan
from launcher.process.job import Job
from launcher.process.signals import USER
from launcher.supervisor import cause, report
from launcher.supervisor.cause import Cause
from launcher.supervisor.loop import EventLoop
from launcher.supervisor.session_handle import SessionHandle
from shmbridge.config import Config
from shmbridge.errors import ShmbridgeError
from shmbridge.shm.session import Lane, Token

_BUSY_S, _RUNNING_S = 0.1, 0.5


class Stage(enum.Enum):
    """Where the job of a run is."""

    STARTING = enum.auto()
    RUNNING = enum.auto()
    CRASHED = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()
    STOPPED = enum.auto()


class Restarts:
    """Whether training that has crashed is started again: as often as train.restarts says, and only while it gets on."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.count = 0
        self._furthest = -1  # step of all generations so far

    def refused(self, lanes: Sequence[Lane]) -> str:
        """Why training is not started again after the generation with these lanes; empty where it is, and counted.

        A generation has got on if a rank came to a later step than any before it; where the script tells no steps, if a rank
        got a reply.
        """
        if not self.allowed:
            return "train.restarts is 0"
        if self.count == self.allowed:
            return f"all {self.allowed} restarts (train.restarts) are used up"
        steps = [step for lane in lanes for record in lane.records if (step := record.step) is not None]
        furthest = max(steps, default=-1)
        if self._furthest >= 0 and furthest <= self._furthest:
            return f"it came no further than step {self._furthest} again"
        if not any(lane.ring.replied for lane in lanes):
            return "it got no reply before it crashed"
        self._furthest = max(furthest, self._furthest)
        self.count += 1
        return ""


class TrainingJob:
    """One run's training, from its start to its exit code."""

    def __init__(
        self, plan: Plan, spec: JobSpec, session: SessionHandle, token: Token | None, run: Path, loop: EventLoop
    ):
        """`token` is of the first generation, which has begun; None without a teacher. `run` is the run's directory."""
        self._plan = plan
        self._spec = spec
        self._session = session
        self._token = token
        self._run = run
        self._loop = loop
        self._console = loop.console
        self._timeouts = plan.config.timeouts
        self._record = run / "train" / "failures.json"
        self._restarts = Restarts(plan.config.train.restarts)
        self._monitor = Monitor(session.view, plan.config, run, loop.console) if session.view else None
        self._stage = Stage.STARTING
        self._job: Job | None = None
        self._crashed_at = 0.0  # monotonic seconds
        self._cause: Cause | None = None
        self._cause_stands = False  # whatever the ends of the jobs may tell
        self._stopped_by: signal.Signals | None = None
        self._saving = False  # ranks run their save hooks before they stop
        self._told_ranks = False  # in a run that stops: nobody answers any more

    # As the loop sees it

    @property
    def done(self) -> bool:
        return self._stage in (Stage.DONE, Stage.FAILED, Stage.STOPPED)

    @property
    def patience_s(self) -> float:
        return _RUNNING_S if self._stage is Stage.RUNNING else _BUSY_S

    def watch(self) -> Iterable[tuple[int, int]]:
        return ()  # jobs and ranks are watched by loop and session

    def step(self, now: float) -> None:
        if self._session.leaving and not self.done:
            self._console.say(self._session.leaving)
            self.on_signal(signal.SIGTERM)
        if self._session.failure and not self.done:
            self._fail(self._session.failure)
        if self._stage is Stage.STARTING:
            self._start(self._token)
        elif self._stage is Stage.RUNNING:
            self._look(now)
        elif self._stage is Stage.CRASHED:
            self._begin_again(now)
        elif self._stage is Stage.STOPPED:
            self._see_off()

    def on_signal(self, number: signal.Signals) -> None:
        if number in USER:
            self._console.say(self._session.ranks.forward(number, self._job))
        elif self._stage not in (Stage.FAILED, Stage.STOPPED):
            self._stop(number)
        elif number == signal.SIGINT:
            self._loop.kill()

    # Running

    @property
    def _runs(self) -> bool:
        return self._job is not None and self._job.alive

    def _start(self, token: Token | None) -> None:
        self._stage = Stage.RUNNING
        self._job = self._loop.start(self._spec.within(token) if token else self._spec)

    def _look(self, now: float) -> None:
        found = self._find()
        if found:
            self._crash(found, now)
        elif self._job and self._job.exit and not self._job.exit.failed:
            self._stage = Stage.DONE
            self._session.close(trained=True)
            self._loop.stop()
        elif self._monitor and (overdue := self._monitor.step(now)):
            self._fail(cause.of_overdue(overdue), stands=True)

    def _find(self) -> Cause | None:
        return cause.find(
            [*self._session.jobs, *([self._job] if self._job else [])],
            self._session.view,
            self._loop.oom_kills,
            record=self._record,
            ended_ns=self._session.ranks.ended_ns,
            excused=self._session.no_witnesses,
        )

    def _crash(self, found: Cause, now: float) -> None:
        """Begin again where that is allowed, else end the run."""
        session = self._session
        if found.role in (TEACHER, LAUNCHER) or not session.view:
            self._fail(found)
            return
        refused = "its teacher is lost" if session.lost else self._restarts.refused(session.view.lanes)
        if refused:
            if self._restarts.allowed:
                self._console.say(f"training is not started again: {refused}")
            self._fail(found)
            return
        which = f"restart {self._restarts.count} of {self._restarts.allowed}"
        self._console.say(f"{found.sentence}; training starts again ({which}), the teacher stays loaded")
        self._stage, self._crashed_at = Stage.CRASHED, now
        session.end()
        assert self._job
        self._job.kill()

    def _begin_again(self, now: float) -> None:
        """Once nothing of the crashed generation is left, and the teachers have finished with it."""
        if self._monitor:
            self._monitor.step(now)  # nobody is overdue in a generation that has ended
        if self._runs:
            return
        patience_s = self._timeouts.request_s
        try:
            token = self._session.begin(settings_of(self._plan, self._run), self._plan.ranks)
        except ShmbridgeError as error:
            self._fail(cause.of_launcher(str(error), REFUSED))
            return
        if token:
            if self._record.exists():
                self._record.rename(self._record.with_name(f"failures-{token.generation - 1}.json"))
            self._loop.logs.expect(self._plan.ranks)
            self._start(token)
        elif now - self._crashed_at >= patience_s:
            late = f"after {seconds(patience_s)} (timeouts.request_s); its log tells where it is"
            why = f"the teacher has not finished what the crashed training has left {late}"
            self._fail(cause.of_launcher(why, REFUSED))

    # Ending

    def _fail(self, found: Cause, stands: bool = False) -> None:
        """Tell everyone, and let those who will stop by themselves do so. `stands`: no other cause will be looked for, such as the
        crash that training was to begin again after."""
        self._cause, self._cause_stands = found, stands or found.role == LAUNCHER or self._stage is Stage.CRASHED
        self._stage = Stage.FAILED
        self._console.say(f"{found.sentence.removesuffix('.')}; stopping")
        self._loop.logs.failed = True
        self._session.fail(found)
        ranks, of_teacher = self._session.ranks, found.role in (TEACHER, LAUNCHER)
        grace_s = self._timeouts.save_s if ranks.with_save_hook else self._timeouts.shutdown_s
        self._loop.stop(after_s=0.0 if of_teacher and ranks.absent else grace_s)
        self._session.close(failed=found.rank if found.role == TEACHER else None)

    def _stop(self, number: signal.Signals) -> None:
        """Stop the run. Where ranks have save hooks, these run first, and all ranks are sent their signal after that."""
        self._stage, self._stopped_by = Stage.STOPPED, number
        grace = f"ranks have {seconds(self._timeouts.shutdown_s)} (timeouts.shutdown_s) to save and end"
        self._console.say(f"{number.name}: stopping; {grace}; Ctrl-C kills at once")
        saving = self._session.ranks.with_save_hook
        if saving and self._job:
            self._saving = True
            self._job.hold()
            who = f"rank{'s' if len(saving) > 1 else ''} {listed([str(rank) for rank in saving])}"
            most = seconds(self._timeouts.save_s)
            self._console.say(f"{who}: the save hook runs, {most} at most (timeouts.save_s)")
        if not self._job:  # nothing has been started, and nothing will be
            self._session.close()
        self._session.save()
        self._signal_ranks(after_s=self._timeouts.save_s if saving else 0.0)

    def _signal_ranks(self, after_s: float = 0.0) -> None:
        self._loop.stop(after_s, signal.SIGINT if self._stopped_by == signal.SIGINT else signal.SIGTERM)

    def _see_off(self) -> None:
        """In a run that stops: nothing is waited for once the ranks have saved. The teachers end after the ranks, so that one whose
        handler only took note can finish its step and save. Where they have ended all the same, the ranks' waits are ended."""
        session = self._session
        if self._saving and not session.ranks.with_save_hook:
            self._saving = False
            self._signal_ranks()
        if not self._runs and not session.done:
            session.close()
        elif self._runs and session.ended and not self._told_ranks and self._stopped_by:
            self._told_ranks = True
            session.fail(cause.of_launcher(f"stopped by {self._stopped_by.name}", 128 + self._stopped_by))

    def conclude(self, elapsed_s: float) -> int:
        """Tell how it ended; the exit code."""
        if self._stopped_by is not None:
            self._console.say(f"stopped by {self._stopped_by.name} after {seconds(elapsed_s)}")
            return 128 + self._stopped_by
        absent = self._session.ranks.absent if self._stage is Stage.DONE else []
        if absent and len(absent) == self._plan.ranks:
            self._console.say(
                "no rank connected to the bridge, so the teacher answered nothing: call shmbridge.connect() in the training "
                "script, or run it with --no-teacher"
            )
        elif absent:
            self._console.say(f"rank {listed([str(rank) for rank in absent])} did not connect to the bridge")
        found = self._cause if self._cause_stands else self._find() or self._cause
        if found:
            return report.conclude(found, self._plan, self._loop, elapsed_s, self._run)
        self._console.say(f"done in {seconds(elapsed_s)}")
        return 0


def settings_of(plan: Plan, run: Path) -> Config:
    """As the participants of a generation read them: with the run's directory."""
    return msgspec.structs.replace(plan.config, run_dir=str(run.resolve()))
