"""A teacher kept across runs: owns the session, starts the teachers again, and lends them to one training group at a time.

    loading     there is no generation yet: the teachers load, publish what they return, and idle
    idle        whoever attaches gets the lease
    held        generations, as the group asks for them, until its connection is closed; then the teachers drain

The loop sleeps on the jobs' pidfds, the socket and the signals. It looks by itself ten times a second where only the board
tells that something has come about, and every second or two otherwise.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from launcher.codes import REFUSED
from launcher.console.logs import Logs
from launcher.console.terminal import LAUNCHER, Console
from launcher.console.text import seconds
from launcher.daemon import agreement
from launcher.daemon.messages import (
    Attach,
    Begin,
    Begun,
    End,
    Fail,
    Fingerprint,
    Granted,
    Hello,
    Holder,
    Leaving,
    Look,
    Refused,
    Save,
    Standing,
    Stop,
    ToKeeper,
    Waiting,
    Welcome,
)
from launcher.daemon.reception import Reception, Visitor
from launcher.hang.monitor import Monitor
from launcher.plan import cgroup
from launcher.plan.plan import TEACHER, JobSpec, Plan
from launcher.process import job
from launcher.process.job import Job
from launcher.process.signals import STOP, Signals
from launcher.supervisor import cause, report
from launcher.supervisor.cause import Cause
from launcher.supervisor.ranks import Ranks
from launcher.supervisor.supervise import Ending
from launcher.supervisor.teachers import Teachers
from launcher.supervisor.teardown import Teardown
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError, PlanError, ShmbridgeError
from shmbridge.shm.owner import Owner
from shmbridge.shm.session import Control, Lane
from shmbridge.shm.status import Failure, Phase

_BUSY_TICK_MS, _HELD_TICK_MS, _IDLE_TICK_MS = 100, 1000, 2000
_SHOW_S = 5.0
_AFTER_THE_GRACE_S = 20.0  # more than SIGKILL, clearing up and the last lines of output take
_TELL_EVERY_S = 5.0  # those who wait for the lease, so that they know that the keeper runs
_BEFORE_READY = (Phase.ABSENT, Phase.STARTING, Phase.LOADING, Phase.PROBING, Phase.OFFERED)


class _TeachersBoard:
    """The board as far as it is about the teachers: how training fails is its own launcher's matter."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.control: Control = owner.control
        self.lanes: list[Lane] = []

    def failures(self) -> list[Failure]:
        return [failure for failure in self._owner.failures() if failure.role == TEACHER]


class Keeper:
    """One kept teacher, from the start of its jobs to the last of their processes."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        specs: tuple[JobSpec, ...],
        base: Mapping[str, str],
        owner: Owner,
        run: Path,
        console: Console,
        signals: Signals,
        listener: socket.socket,
        ready: Callable[[], None],
    ) -> None:
        """`specs` are the teachers' jobs; `ready` is called once they have loaded."""
        self._name = name
        self._plan = plan
        self._specs = specs
        self._base = base
        self._owner = owner
        self._run = run
        self._console = console
        self._signals = signals
        self._tell_ready = ready
        self._fingerprint: Fingerprint = agreement.fingerprint(plan.config.teacher.model)
        self._since = time.time()
        self._grace_s = plan.config.timeouts.shutdown_s
        self._oom_kills_before = cgroup.oom_kills()
        self._logs = Logs(console, run / "none", 0)
        self._jobs: dict[str, Job] = {}
        self._ranks = Ranks(owner, 0)
        self._teardown = Teardown(self._jobs, self._grace_s, console)
        self._reception = Reception(listener, self._hear)
        self._visitor: Visitor | None = None  # who holds the lease
        self._holder: Holder | None = None
        self._ended_well = False  # the holder has said that its generation is over
        self._queue: list[Visitor] = []  # to be granted the lease once the teachers idle
        self._told_queue = 0.0  # monotonic seconds
        self._monitor = Monitor(owner, plan.config, run, console)
        self._was_ready = False
        self._has_replies = False
        self._answered = 0  # requests of the generations before this one
        self._ending: Ending | None = None
        self._cause: Cause | None = None
        self._stopped_by: signal.Signals | None = None
        self._leave_at = float("inf")  # monotonic seconds: the holder has had its time to stop

    def run(self) -> int:
        """Run to the end; the exit code."""
        self._started = time.monotonic()
        job.adopt_orphans()
        self._teachers = Teachers(
            self._plan.config, self._owner, self._jobs, self._ranks, self._console, self._start_job
        )
        try:
            for spec in self._specs:
                self._jobs[spec.name] = self._start_job(spec)
                self._logs.follow(spec.who, spec.log)
            while self._goes_on and not self._teardown.stuck:
                self._tick()
            self._logs.finish()
            return self._conclude()
        finally:
            left = job.clear(self._jobs.values())
            if left:
                self._console.say(f"killed, but still there: {left}; they sleep in the kernel")
            self._ranks.close()
            self._reception.close()
            self._console.flush(_SHOW_S)

    def _start_job(self, spec: JobSpec) -> Job:
        return Job(spec, self._base)

    # The loop

    @property
    def _goes_on(self) -> bool:
        """Also without a teacher, as long as another one may be started."""
        return self._ending is None or any(running.alive for running in self._jobs.values())

    def _tick(self) -> None:
        self._sleep()
        for number in self._signals.take():
            self._on_signal(number)
        for running in [running for running in self._jobs.values() if running.alive]:
            ended = running.poll()
            if ended and ended.signal:
                job.sweep(self._jobs.values())
        job.reap(self._jobs.values())
        self._logs.pump()
        self._reception.attend()
        self._end_lease_of_the_gone()
        if self._ending is None:
            self._tend_teachers()
        if self._ending is None:
            self._look_out()
        if self._ending is None:
            self._tend_lease()
        elif time.monotonic() >= self._leave_at:
            self._owner.fail(self._of_launcher("the kept teacher was stopped", 1).as_failure())
            self._end()
        self._teardown.advance()

    def _sleep(self) -> None:
        reads, writes = self._reception.watch()
        poll = select.poll()
        for fd in (self._signals.fd, *reads, *(running.pidfd for running in self._jobs.values() if running.alive)):
            poll.register(fd, select.POLLIN)
        for fd in writes:
            poll.register(fd, select.POLLIN | select.POLLOUT)
        poll.poll(self._tick_ms)

    @property
    def _tick_ms(self) -> int:
        """Nothing but a sleep's end tells how far a teacher has come; all else wakes the loop, or can wait."""
        if self._ending is not None or self._console.behind:
            return _BUSY_TICK_MS
        if self._idle:
            return _BUSY_TICK_MS if self._queue or self._has_replies else _IDLE_TICK_MS
        return _HELD_TICK_MS if self._holder else _BUSY_TICK_MS

    @property
    def _idle(self) -> bool:
        """Every teacher that is there has drained the latest generation: it may be followed."""
        lost = self._teachers.revival.lost
        there = [record for record in self._owner.control.teachers if record.rank not in lost]
        return all(record.phase is Phase.IDLE and record.identity for record in there)

    def _tend_teachers(self) -> None:
        """See that they load, start them again, and end where they cannot be."""
        try:
            self._teachers.revive()
        except ShmbridgeError as error:
            self._fail(self._of_launcher(str(error), REFUSED))
            return
        self._teachers.show_progress()
        if self._teachers.ready and not self._was_ready:
            self._was_ready = True
            self._console.say(f"ready; train with: shmbridge-launch --attach {self._name} ... -- train.py")
            self._tell_ready()
        found = self._find()
        if found and not (self._teachers.survives(found) and not self._teachers.lost):
            self._fail(found)
        early = [one for one in self._jobs.values() if one.exit and not one.exit.failed and not one.asked]
        if early and self._ending is None:
            self._fail(self._of_launcher(f"{early[0].spec.who} ended although it is kept", 1))

    def _look_out(self) -> None:
        """Print the hang report where it is due, and end where a teacher does not become ready. How ranks fail is the matter of
        their own launcher."""
        overdue = self._monitor.step(time.monotonic())
        if overdue and overdue.who.role == TEACHER:
            self._fail(cause.of_overdue(overdue))

    def _find(self) -> Cause | None:
        jobs, nowhere = list(self._jobs.values()), self._run / "no-training"
        return cause.find(jobs, _TeachersBoard(self._owner), nowhere, {}, self._oom_kills, self._teachers.no_witnesses)

    @property
    def _oom_kills(self) -> int | None:
        return cgroup.oom_kills_since(self._oom_kills_before)

    # The lease

    def _tend_lease(self) -> None:
        """Give back what the last group's generation took, and let the next one in."""
        self._queue = [visitor for visitor in self._queue if visitor.open]
        if time.monotonic() - self._told_queue >= _TELL_EVERY_S:
            self._told_queue = time.monotonic()
            for visitor in self._queue:
                visitor.send(self._wait_for_lease())
        if self._holder or not self._idle:
            return
        if self._has_replies:
            self._owner.free_replies()
            self._has_replies = False
        if self._queue:
            self._grant(self._queue.pop(0))
        while self._holder and self._queue:
            self._queue.pop(0).send(self._held("One group at a time: wait for it to end, or end it."))

    def _grant(self, visitor: Visitor) -> None:
        self._visitor = self._reception.holder = visitor
        self._holder = Holder(visitor.pid, time.time())
        self._ended_well = True  # no generation has begun
        logs = tuple(str(spec.log.resolve()) for spec in self._specs)
        visitor.send(Granted(self._owner.session_id, logs))

    def _end_lease_of_the_gone(self) -> None:
        if self._visitor is None or self._visitor.open or self._holder is None:
            return
        holder, self._visitor, self._holder, self._reception.holder = self._holder, None, None, None
        if not self._ended_well:
            gone = self._of_launcher(f"the launcher of this training group (pid {holder.pid}) is gone: killed?", 1)
            self._owner.fail_generation(gone.as_failure())
        self._owner.end_training()
        if holder.generation:
            how = "has ended" if self._ended_well else "is gone without a word; its generation is ended"
            self._console.say(f"the training group of pid {holder.pid} {how}; the teacher stays")
        if self._ending is Ending.STOPPED:
            self._end()

    def _hear(self, visitor: Visitor, message: ToKeeper) -> None:
        match message:
            case Hello():
                settings = msgspec.Raw(config.to_json(self._plan.config))
                visitor.send(Welcome(self._name, self._fingerprint, settings))
            case Look():
                visitor.send(self._standing())
            case Stop():
                self._hear_stop(visitor, message)
            case Attach():
                self._hear_attach(visitor, message)
            case _ if visitor is self._visitor and self._holder:
                self._hear_holder(visitor, self._holder, message)
            case _:
                visitor.close()

    def _hear_stop(self, visitor: Visitor, message: Stop) -> None:
        if self._holder and not message.force:
            visitor.send(self._held("End that run first, or end both with --force."))
            return
        visitor.send(self._leaving("stopped"))
        self._leave(f"the kept teacher {self._name} is stopped (by pid {visitor.pid})")

    def _hear_attach(self, visitor: Visitor, message: Attach) -> None:
        try:
            agreement.check(self._name, self._fingerprint, message.fingerprint)
            tokenizers = self._fingerprint.tokenizer, message.fingerprint.tokenizer
            agreement.check_settings(self._name, self._plan.config, message.settings, tokenizers)
        except ConfigError as error:
            visitor.send(Refused("settings", str(error)))
            return
        if self._ending is not None:
            visitor.send(Refused("held", f"the kept teacher {self._name} is being stopped."))
        elif self._holder:
            visitor.send(self._held("One group at a time: wait for it to end, or end it."))
        elif self._idle:
            self._grant(visitor)
        else:
            self._queue.append(visitor)
            visitor.send(self._wait_for_lease())

    def _hear_holder(self, visitor: Visitor, holder: Holder, message: ToKeeper) -> None:
        match message:
            case Begin():
                visitor.send(self._begin(holder, message))
            case End():
                self._ended_well = True
                self._owner.end_training()
            case Save():
                self._owner.ask_to_stop()
            case Fail():
                self._ended_well = True
                self._owner.fail_generation(message.failure)
                self._owner.end_training()

    def _begin(self, holder: Holder, message: Begin) -> Begun | Refused:
        """A generation for the holder, with its reply memory."""
        if not self._idle:
            return Refused("held", f"the kept teacher {self._name} is {self._state}.")
        before, answered = self._owner.settings, self._answered_now
        try:
            agreement.check_settings(self._name, self._plan.config, message.settings, ("", ""))
            if message.ranks < len(self._specs):
                raise ConfigError(f"{message.ranks} ranks cannot keep {len(self._specs)} replicas of the teacher busy.")
            self._owner.describe(message.settings)
            self._owner.start_generation(message.ranks)
            self._answered += answered
            self._ranks.close()
            self._ranks = Ranks(self._owner, message.ranks)
            self._teachers.serve(self._ranks)
            created = self._teachers.agree()
        except PlanError as error:
            self._undo_begin(before)
            remedy = f"These are settings of the kept teacher {self._name}: fewer ranks need less, or start it again with others."
            return Refused("memory", f"{error} {remedy}")
        except ConfigError as error:
            self._undo_begin(before)
            return Refused("settings", str(error))
        self._has_replies, self._ended_well = True, False
        generation = self._owner.generation
        run = message.settings.run_dir
        self._holder = msgspec.structs.replace(holder, run=run, generation=generation, ranks=message.ranks)
        self._console.say(f"generation {generation}: {message.ranks} ranks of pid {holder.pid}, run {run}; {created}")
        return Begun(generation)

    def _undo_begin(self, settings: Config) -> None:
        """End a generation that could not begin, or could not get its replies; the next one may."""
        self._owner.describe(settings)
        self._owner.end_training()

    # Telling

    def _wait_for_lease(self) -> Waiting:
        return Waiting(f"the kept teacher {self._name} is {self._state}")

    def _held(self, remedy: str) -> Refused:
        assert self._holder
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._holder.since))
        run = self._holder.run or "not made yet"
        who = f"pid {self._holder.pid} (run directory {run})"
        return Refused("held", f"the kept teacher {self._name} is held by {who} since {since}. {remedy}")

    @property
    def _state(self) -> str:
        """One phrase: idle; held; loading (3 of 14)."""
        if self._ending is not None:
            return "being stopped"
        if self._holder:
            return "held"
        if self._idle:
            return "idle"
        loading = next((record for record in self._owner.control.teachers if record.phase in _BEFORE_READY), None)
        if loading is None:
            return "finishing what the last training group left"
        done, total = loading.progressed
        share = f", {done} of {total}" if total else ""
        return f"loading{' again' if self._was_ready else ''} ({loading.phase}{share})"

    @property
    def _answered_now(self) -> int:
        return sum(lane.ring.replied for lane in self._owner.lanes)

    def _standing(self) -> Standing:
        teachers = self._owner.control.teachers
        gpus = ",".join(str(gpu.number) for own in self._plan.teachers for gpu in own)
        return Standing(
            name=self._name,
            pid=os.getpid(),
            session=self._owner.session_id,
            run=str(self._run.resolve()),
            model=self._plan.config.teacher.model,
            gpus=gpus,
            plane=self._plan.config.plane,
            since=self._since,
            state=self._state,
            teachers=tuple(who.pid if (who := record.identity) else 0 for record in teachers),
            answered=self._answered + self._answered_now,
            holder=self._holder,
        )

    # Ending

    def _on_signal(self, number: signal.Signals) -> None:
        if number not in STOP:
            return
        if self._ending is None:
            self._stopped_by = number
            self._leave(f"the kept teacher {self._name} is stopped by {number.name}")
        elif number == signal.SIGINT:
            self._teardown.kill()

    def _leave(self, reason: str) -> None:
        """End once the holder has had its time to save and to stop."""
        if self._ending is not None:
            return
        self._ending = Ending.STOPPED
        self._console.say(f"{reason}; stopping")
        for visitor in self._queue:
            visitor.send(Refused("held", f"{reason}."))
        if self._visitor:
            self._visitor.send(self._leaving(reason))
            self._leave_at = time.monotonic() + self._of_the_holder_s
        else:
            self._end()

    @property
    def _of_the_holder_s(self) -> float:
        """What a group that is to end is given to save and to stop."""
        timeouts = self._owner.settings.timeouts
        return timeouts.save_s + 2 * timeouts.shutdown_s

    def _leaving(self, reason: str) -> Leaving:
        group = f"the training group of pid {self._holder.pid} and " if self._holder else ""
        within_s = (self._of_the_holder_s if self._holder else 0.0) + self._grace_s + _AFTER_THE_GRACE_S
        return Leaving(reason, f"{group}the teacher", within_s)

    def _end(self) -> None:
        self._leave_at = float("inf")
        self._teachers.end()
        self._teardown.begin()

    def _fail(self, found: Cause) -> None:
        self._ending = Ending.FAILED
        self._cause = found
        self._console.say(f"{found.sentence}; stopping")
        self._owner.fail(found.as_failure())
        self._teachers.end(found.rank if found.role == TEACHER else None)
        self._teardown.begin()

    def _conclude(self) -> int:
        elapsed_s = time.monotonic() - self._started
        if self._cause:
            replica = self._cause.rank if self._cause.role == TEACHER else None
            ended = next((one.exit for one in self._jobs.values() if one.spec.replica == replica), None)
            made = report.make(self._cause, ended, self._plan, self._logs, elapsed_s, self._oom_kills, self._run)
            report.tell(made, self._console)
            return made.exit_code
        answered = self._answered + self._answered_now
        self._console.say(
            f"the kept teacher {self._name} has ended after {seconds(elapsed_s)}, {answered} requests answered"
        )
        return 128 + self._stopped_by if self._stopped_by else 0

    def _of_launcher(self, reason: str, status: int) -> Cause:
        return Cause(LAUNCHER, 0, LAUNCHER, os.getpid(), reason, status, time.monotonic_ns())
