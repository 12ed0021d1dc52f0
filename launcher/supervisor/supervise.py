"""Order, readiness, first failure wins, teardown.

The jobs start together. The loop sleeps on their pidfds, the ranks' and the signals', 0.5 s at most, and then looks
at everything again. A run ends in one of three ways, and whichever comes first decides the exit code:

    training ends with 0      the teachers are told, drain and end by themselves
    something fails           the cause goes on the board, so that everyone stops with it; then the jobs are ended
    the user stops it         SIGINT or SIGTERM goes on to each rank (SIGHUP as SIGTERM), so that the script's own handlers
                              save; the teachers serve until the last rank has ended

Whatever still runs one grace (timeouts.shutdown_s) after the ranks were sent their signal is killed with SIGKILL.
"""

from __future__ import annotations

import enum
import os
import select
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from launcher.codes import REFUSED
from launcher.console.logs import Logs
from launcher.console.terminal import LAUNCHER, Console
from launcher.console.text import listed, seconds
from launcher.hang.monitor import Monitor
from launcher.plan import cgroup
from launcher.plan.plan import TEACHER, TRAIN, JobSpec, Plan
from launcher.process import job
from launcher.process.job import Job
from launcher.process.signals import USER, Signals
from launcher.supervisor import cause, report
from launcher.supervisor.cause import Cause
from launcher.supervisor.ranks import Ranks
from launcher.supervisor.rerun import Reruns
from launcher.supervisor.steering import Serving, Steering
from launcher.supervisor.teachers import Teachers
from launcher.supervisor.teardown import Teardown
from shmbridge.errors import ShmbridgeError
from shmbridge.shm.owner import Owner
from shmbridge.shm.session import Token

# How long the loop sleeps: short while log lines come, twice as long each time that nothing did.
_TICK_MS, _LONGEST_TICK_MS, _LONGEST_BUSY_TICK_MS = 50, 500, 100
_SHOW_S = 5.0


class Ending(enum.Enum):
    """Why a run ends."""

    DONE = enum.auto()
    FAILED = enum.auto()
    STOPPED = enum.auto()


class Supervisor:
    """One run, from the start of its jobs to the last of their processes."""

    def __init__(
        self,
        plan: Plan,
        specs: tuple[JobSpec, ...],
        base: Mapping[str, str],
        owner: Steering | None,
        run: Path,
        console: Console,
        signals: Signals,
        kept: Serving | None = None,
    ) -> None:
        """`signals` outlives the run, and `owner`: what it takes from before the start on is acted on here. `kept` are the
        teachers of another launcher's; without them `owner` is an Owner, and the teachers are among the jobs."""
        self._plan = plan
        self._specs = specs
        self._base = base
        self._owner = owner
        self._run = run
        self._console = console
        self._signals = signals
        self._tick_ms = _TICK_MS
        self._grace_s = plan.config.timeouts.shutdown_s
        self._logs = Logs(console, run / "train", plan.ranks)
        self._ranks = Ranks(owner, plan.ranks)
        self._record = run / "train" / "failures.json"
        self._oom_kills_before = cgroup.oom_kills()
        self._told_stop = self._told_teachers = False
        self._jobs: dict[str, Job] = {}
        self._reruns = Reruns(plan.config.train.restarts)
        self._crashed = False  # training has, and is to start again
        self._saving = False  # ranks run their save hooks before they stop
        self._monitor = Monitor(owner, plan.config, run, console) if owner else None
        self._never_attached: Cause | None = None
        self._teachers: Serving | None = kept  # None where the bridge is off, and until the jobs start
        self._ending: Ending | None = None
        self._cause: Cause | None = None
        self._stopped_by: signal.Signals | None = None
        self._teardown = Teardown(self._jobs, self._grace_s, console)

    def run(self) -> int:
        """Run to the end; the launcher's exit code."""
        self._started = time.monotonic()
        job.adopt_orphans()
        try:
            self._take_signals()
            if self._ending is None:
                self._start()
            while self._goes_on and not self._teardown.stuck:
                self._tick()
            self._logs.finish()
            return self._conclude()
        finally:
            self._clear()
            self._ranks.close()
            self._console.flush(_SHOW_S)

    def follow(self, who: str, log: Path) -> None:
        """Show what a process that is another launcher's writes from now on."""
        self._logs.follow(who, log, from_end=True)

    def _start(self) -> None:
        for spec in self._specs:
            self._jobs[spec.name] = self._start_job(spec)
            self._logs.follow(spec.who, spec.log)
        if isinstance(self._owner, Owner):
            self._teachers = Teachers(
                self._plan.config, self._owner, self._jobs, self._ranks, self._console, self._start_job
            )

    def _start_job(self, spec: JobSpec) -> Job:
        """In the generation that the session is at by now."""
        if self._owner:
            spec = spec.within(Token(self._owner.session_id, self._owner.generation))
        return Job(spec, self._base)

    @property
    def _goes_on(self) -> bool:
        starts_again = self._crashed and self._ending is None
        return starts_again or any(running.alive for running in self._jobs.values())

    def _tick(self) -> None:
        self._sleep()
        self._take_signals()
        for running in [running for running in self._jobs.values() if running.alive]:
            ended = running.poll()
            if ended and ended.signal:
                job.sweep(self._jobs.values())
        job.reap(self._jobs.values())
        shown = self._logs.pump()
        if self._teachers and self._ending is None:
            self._agree(self._teachers)
            self._teachers.show_progress()
        if self._teachers and self._ending in (None, Ending.DONE):
            self._tolerate_late_crash(self._teachers)
        if self._ending is None:
            self._look()
            self._look_out()
        elif self._ending is Ending.STOPPED:
            self._end_savers()
            self._end_teachers_after_training()
        self._teardown.advance()
        self._tick_ms = _TICK_MS if shown else min(2 * self._tick_ms, self._longest_tick_ms)

    @property
    def _longest_tick_ms(self) -> int:
        """Nothing but a sleep's end tells of a teacher's offer or a due SIGKILL; all else wakes the loop or can wait."""
        quiet = self._ending is None and (self._teachers is None or self._teachers.ready)
        return _LONGEST_TICK_MS if quiet and not self._console.behind else _LONGEST_BUSY_TICK_MS

    def _sleep(self) -> None:
        poll = select.poll()
        for fd in (self._signals.fd, *(running.pidfd for running in self._jobs.values() if running.alive)):
            poll.register(fd, select.POLLIN)
        for fd in (*self._ranks.watch(), *(self._teachers.watch() if self._teachers else ())):
            poll.register(fd, select.POLLIN)
        self._ranks.note_ended({fd for fd, _ in poll.poll(self._tick_ms)})

    def _agree(self, teachers: Serving) -> None:
        """Create the reply memory once every teacher has said what it returns; start new ones in the place of the dead."""
        try:
            created = teachers.agree()
            teachers.revive()
        except ShmbridgeError as error:
            self._fail(self._of_launcher(str(error), REFUSED))
        else:
            if created:
                self._console.say(f"reply memory: {created}")

    # Deciding

    def _look(self) -> None:
        """End the run where something failed, or training has finished."""
        found = self._find()
        training = self._jobs[TRAIN]
        early = self._teachers.ended_early() if self._teachers else None
        if self._crashed:
            self._start_training_again()
        elif found and not self._survives(found):
            self._fail(found)
        elif found:
            pass
        elif training.exit and not training.exit.failed:
            self._finish()
        elif early:
            name = f"the {early.spec.who}" if early.name == TEACHER else early.spec.who
            self._fail(self._of_launcher(f"{name} ended although ranks were still to be served", 1))

    def _look_out(self) -> None:
        """Print the hang report where it is due, and end the run of ranks that never attach."""
        if self._monitor and self._ending is None and not self._crashed:
            overdue = self._monitor.step(time.monotonic())
            if overdue:
                self._never_attached = cause.of_overdue(overdue)
                self._fail(self._never_attached)

    def _survives(self, found: Cause) -> bool:
        """Whether the run goes on after a failure: with a new teacher, without one, or with new ranks."""
        if not self._teachers or not self._teachers.ready:
            return False
        if found.role == TEACHER:
            return self._teachers.survives(found)
        if found.role == LAUNCHER or not self._owner:
            return False
        refused = "its teacher is lost" if self._teachers.lost else self._reruns.grant(self._owner.lanes)
        if refused:
            if self._reruns.allowed:
                self._console.say(f"training is not started again: {refused}")
            return False
        which = f"restart {self._reruns.count} of {self._reruns.allowed}"
        self._console.say(f"{found.sentence}; training starts again ({which}), the teacher stays loaded")
        self._crashed = True
        self._owner.end_training()
        self._jobs[TRAIN].kill()
        return True

    def _start_training_again(self) -> None:
        """Once nothing of the crashed generation is left, start the next."""
        old = self._jobs[TRAIN]
        assert self._owner and self._teachers
        if old.alive or not self._teachers.drained:
            return
        self._crashed = False
        if self._record.exists():
            self._record.rename(self._record.with_name(f"failures-{self._owner.generation}.json"))
        try:
            self._owner.start_generation()
        except ShmbridgeError as error:
            self._fail(self._of_launcher(str(error), REFUSED))
            return
        self._ranks.close()
        self._ranks = Ranks(self._owner, self._plan.ranks)
        self._teachers.serve(self._ranks)
        self._logs.expect(self._plan.ranks)
        self._jobs[TRAIN] = self._start_job(old.spec)
        self._agree(self._teachers)  # not a tick later: a stop in between would leave teachers without reply memory

    def _find(self) -> Cause | None:
        jobs = list(self._jobs.values())
        served = self._teachers.no_witnesses if self._teachers else ()
        ended = any(running.exit for running in jobs) or self._record.exists()
        oom_kills = self._oom_kills if ended else None  # the kernel's counter costs more than the rest of a quiet tick
        return cause.find(jobs, self._owner, self._record, self._ranks.ended_ns, oom_kills, served)

    @property
    def _oom_kills(self) -> int | None:
        return cgroup.oom_kills_since(self._oom_kills_before)

    def _tolerate_late_crash(self, teachers: Serving) -> None:
        """A teacher that crashes in its exit, with every rank of its own done, takes nothing from the training. Where no rank has
        connected, its failure is the run's."""
        training = self._jobs[TRAIN].exit
        if len(self._ranks.absent) == self._ranks.count:
            return
        for teacher in teachers.crashed_late(training is not None and not training.failed):
            assert teacher.exit
            late = cause.of_exit(teacher, teacher.exit, self._oom_kills)
            self._console.say(f"warning: {late.sentence} after the ranks had finished with it; see {teacher.spec.log}")

    def _finish(self) -> None:
        self._ending = Ending.DONE
        if self._owner:
            self._owner.end_session()
        self._teardown.begin()  # and not Teachers.end: one that still loads may show now that it cannot

    def _fail(self, found: Cause) -> None:
        """Tell everyone, and let those who will stop by themselves do so."""
        self._ending = Ending.FAILED
        self._cause = found
        self._console.say(f"{found.sentence}; stopping")
        if self._owner:
            self._owner.fail(found.as_failure())
        of_teacher = found.role in (TEACHER, LAUNCHER)
        grace_s = self._plan.config.timeouts.save_s if self._ranks.with_save_hook else self._grace_s
        self._teardown.begin(after_s=grace_s if self._ranks.all_signed_in or not of_teacher else 0.0)
        if self._teachers:
            self._teachers.end(found.rank if found.role == TEACHER else None)

    def _take_signals(self) -> None:
        for number in self._signals.take():
            self._on_signal(number)
        if self._teachers and self._teachers.asks_to_stop and self._ending is None:
            self._console.say(self._teachers.asks_to_stop)
            self._on_signal(signal.SIGTERM)

    def _on_signal(self, number: signal.Signals) -> None:
        if number in USER:
            self._console.say(self._ranks.forward(number, self._jobs.get(TRAIN)))
        elif self._ending in (None, Ending.DONE):
            self._ending = Ending.STOPPED
            self._stopped_by = number
            self._stop(number)
        elif number == signal.SIGINT:
            self._teardown.kill()

    def _stop(self, number: signal.Signals) -> None:
        """Stop the run. Where ranks have save hooks, these run first, and all ranks are sent their signal after that."""
        grace = f"ranks have {seconds(self._grace_s)} (timeouts.shutdown_s) to save and end"
        self._console.say(f"{number.name}: stopping; {grace}; Ctrl-C kills at once")
        saving = self._ranks.with_save_hook
        if saving:
            self._saving = True
            self._jobs[TRAIN].hold()
            ranks = listed([str(rank) for rank in saving])
            who = f"ranks {ranks} run their save hooks" if len(saving) > 1 else f"rank {ranks} runs its save hook"
            most = seconds(self._plan.config.timeouts.save_s)
            self._console.say(f"{who}, {most} at most (timeouts.save_s)")
        if self._owner:
            self._owner.ask_to_stop()  # before any rank ends: its end is then known to be no failure
        self._signal_ranks(after_s=self._plan.config.timeouts.save_s if saving else 0.0)

    def _signal_ranks(self, after_s: float = 0.0) -> None:
        interrupted = self._stopped_by == signal.SIGINT
        self._teardown.begin(after_s, signal.SIGINT if interrupted else signal.SIGTERM)

    def _end_savers(self) -> None:
        """Once the ranks have saved, nothing is waited for."""
        if self._saving and not self._ranks.with_save_hook:
            self._saving = False
            self._signal_ranks()

    def _end_teachers_after_training(self) -> None:
        """Not before, so that a rank whose handler only took note can finish its step and save. Where the teachers have ended
        all the same, the ranks' waits for them are ended."""
        if not self._owner or not self._teachers:
            return
        if not self._jobs[TRAIN].alive:
            if not self._told_teachers:
                self._told_teachers = True
                self._teachers.end()
        elif self._teachers.ended and not self._told_stop:
            self._told_stop = True
            assert self._stopped_by is not None
            self._owner.fail(
                self._of_launcher(f"stopped by {self._stopped_by.name}", 128 + self._stopped_by).as_failure()
            )

    # Ending

    def _clear(self) -> None:
        """Leave no process behind, however the loop ended."""
        left = job.clear(self._jobs.values())
        if left:
            self._console.say(f"killed, but still there: {left}; they sleep in the kernel, which alone can end them")

    def _conclude(self) -> int:
        """Tell how it ended; the exit code."""
        elapsed_s = time.monotonic() - self._started
        if self._stopped_by is not None:
            self._console.say(f"stopped by {self._stopped_by.name} after {seconds(elapsed_s)}")
            return 128 + self._stopped_by
        if self._ending is Ending.DONE:
            self._tell_who_did_not_connect()
        found = self._root_cause()
        if found:
            return self._report(found, elapsed_s)
        self._console.say(f"done in {seconds(elapsed_s)}")
        return 0

    def _tell_who_did_not_connect(self) -> None:
        absent = self._ranks.absent
        if len(absent) == self._ranks.count:
            self._console.say(
                "no rank connected to the bridge, so the teacher answered nothing: call shmbridge.connect() in the training "
                "script, or run it with --no-teacher"
            )
        elif absent:
            self._console.say(f"rank {listed([str(rank) for rank in absent])} did not connect to the bridge")

    def _report(self, found: Cause, elapsed_s: float) -> int:
        replica = found.rank if found.role == TEACHER else None
        ended = next((running.exit for running in self._jobs.values() if running.spec.replica == replica), None)
        made = report.make(found, ended, self._plan, self._logs, elapsed_s, self._oom_kills, self._run)
        report.tell(made, self._console)
        return made.exit_code

    def _root_cause(self) -> Cause | None:
        """With everything ended, torchrun's record and the exit codes are there; they may name an earlier failure."""
        if self._cause and (self._cause.role == LAUNCHER or self._cause is self._never_attached):
            return self._cause
        return self._find() or self._cause

    def _of_launcher(self, reason: str, status: int) -> Cause:
        return Cause(LAUNCHER, 0, LAUNCHER, os.getpid(), reason, status, time.monotonic_ns())
