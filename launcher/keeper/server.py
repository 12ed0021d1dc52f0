"""The keeper's socket: who comes, what they ask for, and which training group holds the session.

It takes only processes of this user. One that says garbage is dropped; of too many the oldest that only asks makes room; nobody is
waited for.

One group at a time holds the session: it may begin while the teachers load, and waits only while they finish what the group before it
has left.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from launcher.console.text import seconds
from launcher.hang.monitor import Monitor
from launcher.keeper import agreement, messages
from launcher.keeper.messages import (
    Begin,
    Begun,
    End,
    Fail,
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
from launcher.keeper.transport import BACKLOG, Lines, credentials
from launcher.plan.jobs import TEACHER, Plan
from launcher.process.signals import STOP
from launcher.supervisor import cause, report
from launcher.supervisor.handle import LOADING_PHASES, MAY_BEGIN, State
from launcher.supervisor.hosted import HostedSession
from launcher.supervisor.loop import EventLoop
from shmbridge import config
from shmbridge.errors import ConfigError, PlanError
from shmbridge.shm.record import Phase

Visitor = Lines[ToKeeper]
_MOST_VISITORS = 32
_BUSY_S = 0.1
_AFTER_THE_GRACE_S = 20.0  # more than SIGKILL, clearing up and the last lines of output take
_TELL_EVERY_S = 5.0  # those who wait, so that they know that the keeper runs
_NEVER = float("inf")


class Listener:
    """Serves the socket of one kept teacher, and decides when its session is closed."""

    def __init__(
        self,
        plan: Plan,
        session: HostedSession,
        run: Path,
        loop: EventLoop,
        listener: socket.socket,
        ready: Callable[[], None],
    ) -> None:
        """`run` is the keeper's directory; `ready` is called once the teachers have loaded."""
        self._name = plan.config.name
        self._plan = plan
        self._session = session
        self._run = run
        self._loop = loop
        self._console = loop.console
        self._listener = listener
        self._tell_ready = ready
        self._fingerprint = agreement.fingerprint(plan.config.teacher.model)
        self._since = time.time()
        self._monitor = Monitor(session.view, plan.config, run, loop.console)
        self._visitors: list[Visitor] = []  # the oldest first
        self._queue: list[tuple[Visitor, Begin]] = []  # who may begin once the teachers have drained
        self._told_queue = 0.0  # monotonic seconds
        self._visitor: Visitor | None = None  # whose launcher holds the session
        self._holder: Holder | None = None
        self._ended_well = True  # the holder has said that its generation is over
        self._was_ready = False
        self._failed = False
        self._leaving = ""
        self._stopped_by: signal.Signals | None = None
        self._close_at = _NEVER  # monotonic seconds: the holder has had its time to stop

    # As the loop sees it

    @property
    def done(self) -> bool:
        return self._session.done

    @property
    def patience_s(self) -> float:
        return _BUSY_S if self._queue or self._leaving else _NEVER

    def watch(self) -> Iterable[tuple[int, int]]:
        yield self._listener.fileno(), select.POLLIN
        for visitor in self._visitors:
            if visitor.open:
                yield visitor.fd, select.POLLIN | (select.POLLOUT if visitor.behind else 0)

    def step(self, now: float) -> None:
        self._accept()
        for visitor in list(self._visitors):
            for message in visitor.receive():
                self._hear(visitor, message)
            visitor.flush()
        self._visitors = [visitor for visitor in self._visitors if visitor.open]
        self._let_go_of_the_gone()
        if self._leaving:
            self._close_when_due(now)
        elif not self._failed:
            self._look_at_teachers(now)
            self._serve_queue(now)

    def on_signal(self, number: signal.Signals) -> None:
        if number not in STOP:
            return
        if not self._leaving and not self._failed:
            self._stopped_by = number
            self._leave(f"the kept teacher {self._name} is stopped by {number.name}")
        elif number == signal.SIGINT:
            self._session.close()  # whatever the holder may still need
            self._loop.kill()

    def conclude(self, elapsed_s: float) -> int:
        """Tell how it ended; the exit code."""
        for visitor in self._visitors:
            visitor.close()
        found = self._session.failure
        if found and self._failed:
            return report.conclude(found, self._plan, self._loop, elapsed_s, self._run)
        answered = f"{self._session.answered} requests answered"
        self._console.say(f"the kept teacher {self._name} has ended after {seconds(elapsed_s)}, {answered}")
        return 128 + self._stopped_by if self._stopped_by else 0

    # The teachers

    def _look_at_teachers(self, now: float) -> None:
        """Tell when they have loaded, report where one stands still, end where one cannot be. How ranks fail is the matter of their
        own launcher."""
        if self._session.ready and not self._was_ready:
            self._was_ready = True
            train = self._plan.config.train
            group = f"--train-gpus {train.gpus}" if train.gpus else f"--cpu {train.cpu_ranks}"
            self._console.say(f"ready; train with: shmbridge-launch --attach {self._name} {group} -- train.py")
            self._tell_ready()
        overdue = self._monitor.step(now)
        if overdue and overdue.who.role == TEACHER:
            self._session.failure = self._session.failure or cause.of_overdue(overdue)
        found = self._session.failure
        if found:
            self._failed = True
            self._console.say(f"{found.sentence}; stopping")
            self._refuse_queue(f"the kept teacher {self._name} ends: {found.sentence}.")
            self._session.fail(found)
            self._close(found.rank if found.role == TEACHER else None)

    def _close(self, failed: int | None = None) -> None:
        self._close_at = _NEVER
        self._session.close(failed=failed)
        self._loop.stop()

    # Who comes

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody (else) there; or they have gone, or there are no file descriptors left
                return
            if not credentials(connection).is_mine:
                connection.close()
                continue
            self._visitors.append(Lines(connection, messages.AT_KEEPER))
            if len(self._visitors) > _MOST_VISITORS:
                spared = [self._visitor, *(visitor for visitor, _ in self._queue)]
                oldest = next(visitor for visitor in self._visitors if visitor not in spared)
                oldest.close()
                self._visitors.remove(oldest)

    def _hear(self, visitor: Visitor, message: ToKeeper) -> None:
        match message:
            case Hello():
                settings = msgspec.Raw(config.to_json(self._plan.config))
                visitor.send(Welcome(self._name, self._fingerprint, settings))
            case Look():
                visitor.send(self._standing())
            case Stop():
                self._hear_stop(visitor, message)
            case Begin():
                self._hear_begin(visitor, message)
            case _ if visitor is self._visitor:
                self._hear_holder(message)
            case _:
                visitor.close()

    def _hear_stop(self, visitor: Visitor, message: Stop) -> None:
        if self._holder and not message.force:
            visitor.send(self._held("End that run first, or end both with --force."))
            return
        visitor.send(self._farewell("stopped"))
        self._leave(f"the kept teacher {self._name} is stopped (by pid {visitor.pid})")

    def _hear_holder(self, message: ToKeeper) -> None:
        match message:
            case End():
                self._ended_well = True
                self._session.end()
            case Save():
                self._session.save()
            case Fail():
                self._ended_well = True
                self._session.fail(message.failure)
                self._session.end()

    # Generations

    def _hear_begin(self, visitor: Visitor, message: Begin) -> None:
        try:
            agreement.check(self._name, self._fingerprint, message.fingerprint)
            tokenizers = self._fingerprint.tokenizer, message.fingerprint.tokenizer
            agreement.check_settings(self._name, self._plan.config, message.settings, tokenizers)
            if message.ranks < len(self._plan.teachers):
                replicas = len(self._plan.teachers)
                raise ConfigError(f"{message.ranks} ranks cannot keep {replicas} replicas of the teacher busy.")
        except ConfigError as error:
            visitor.send(Refused("settings", str(error)))
            return
        if self._leaving or self._failed:
            visitor.send(Refused("held", f"the kept teacher {self._name} is being stopped."))
        elif self._session.state in MAY_BEGIN or self._visitor not in (None, visitor):
            self._begin_or_refuse(visitor, message)
        else:
            self._queue.append((visitor, message))
            self._tell_to_wait(visitor)

    def _serve_queue(self, now: float) -> None:
        """Begin the generation of who has come first, once the teachers have drained; the others find the session held."""
        self._queue = [(visitor, asked) for visitor, asked in self._queue if visitor.open]
        if self._session.state in MAY_BEGIN:
            waiting, self._queue = self._queue, []
            for visitor, asked in waiting:
                self._begin_or_refuse(visitor, asked)
        elif now - self._told_queue >= _TELL_EVERY_S:
            self._told_queue = now
            for visitor, _ in self._queue:
                self._tell_to_wait(visitor)

    def _refuse_queue(self, why: str) -> None:
        for visitor, _ in self._queue:
            visitor.send(Refused("held", why))

    def _begin_or_refuse(self, visitor: Visitor, asked: Begin) -> None:
        one_holds = self._visitor not in (None, visitor)
        remedy = "One group at a time: wait for it to end, or end it."
        visitor.send(self._held(remedy) if one_holds else self._begin(visitor, asked))

    def _begin(self, visitor: Visitor, asked: Begin) -> Begun | Refused:
        try:
            token = self._session.begin(asked.settings, asked.ranks)
        except PlanError as error:
            remedy = f"These are settings of the kept teacher {self._name}: fewer ranks need less, or start it again with others."
            return Refused("memory", f"{error} {remedy}")
        except ConfigError as error:
            return Refused("settings", str(error))
        since = self._holder.since if self._holder else time.time()
        run, generation = asked.settings.run_dir, token.generation
        self._visitor, self._ended_well = visitor, False
        self._holder = Holder(visitor.pid, since, run, generation, asked.ranks)
        self._console.say(f"generation {generation}: {asked.ranks} ranks of pid {visitor.pid}, run {run}")
        return Begun(token.session_id, generation, tuple(str(job.spec.log.resolve()) for job in self._session.jobs))

    def _let_go_of_the_gone(self) -> None:
        if self._visitor is None or self._visitor.open or self._holder is None:
            return
        pid, self._visitor, self._holder = self._holder.pid, None, None
        if not self._ended_well:
            gone = cause.of_launcher(f"the launcher of this training group (pid {pid}) is gone: killed?", 1)
            self._session.fail(gone)
        self._session.end()
        how = "has ended" if self._ended_well else "is gone without a word; its generation is ended"
        stays = "" if self._leaving or self._failed else "; the teacher stays"
        self._console.say(f"the training group of pid {pid} {how}{stays}")

    # Telling

    def _tell_to_wait(self, visitor: Visitor) -> None:
        visitor.send(Waiting(f"the kept teacher {self._name} is {self._state}"))

    def _held(self, remedy: str) -> Refused:
        assert self._holder
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._holder.since))
        who = f"pid {self._holder.pid} (run directory {self._holder.run})"
        return Refused("held", f"the kept teacher {self._name} is held by {who} since {since}. {remedy}")

    @property
    def _state(self) -> str:
        """One phrase: idle; held; loading (loading, 3 of 14)."""
        if self._leaving or self._failed:
            return "being stopped"
        before = (*LOADING_PHASES, Phase.OFFERED)
        loading = next((record for record in self._session.view.control.teachers if record.phase in before), None)
        if self._session.state is State.LOADING and loading:
            done, total = loading.progressed
            share = f", {done} of {total}" if total else ""
            return f"loading{' again' if self._was_ready else ''} ({loading.phase}{share})"
        if self._holder:
            return "held"
        return "idle" if self._session.state is State.IDLE else "finishing what the last training group left"

    def _standing(self) -> Standing:
        teachers = self._session.view.control.teachers
        return Standing(
            name=self._name,
            pid=os.getpid(),
            session=self._session.view.session_id,
            run=str(self._run.resolve()),
            model=self._plan.config.teacher.model,
            gpus=",".join(str(gpu.number) for own in self._plan.teachers for gpu in own),
            plane=self._plan.config.plane,
            since=self._since,
            state=self._state,
            teachers=tuple(who.pid if (who := record.identity) else 0 for record in teachers),
            answered=self._session.answered,
            holder=self._holder,
        )

    # Leaving

    def _leave(self, reason: str) -> None:
        """Close the session once the holder has had its time to save and to stop."""
        if self._leaving or self._failed:
            return
        self._leaving = reason
        self._console.say(f"{reason}; stopping")
        self._refuse_queue(f"{reason}.")
        if self._visitor:
            self._visitor.send(self._farewell(reason))
            self._close_at = time.monotonic() + self._of_the_holder_s
        else:
            self._close()

    def _close_when_due(self, now: float) -> None:
        if self._session.done:
            return
        if self._visitor is None:
            self._close()
        elif now >= self._close_at:
            self._session.fail(cause.of_launcher("the kept teacher was stopped", 1))
            self._close()

    @property
    def _of_the_holder_s(self) -> float:
        """What a group that is to end is given to save and to stop."""
        timeouts = self._session.view.settings.timeouts
        return timeouts.save_s + 2 * timeouts.shutdown_s

    def _farewell(self, reason: str) -> Leaving:
        group = f"the training group of pid {self._holder.pid} and " if self._holder else ""
        grace_s = self._plan.config.timeouts.shutdown_s
        within_s = (self._of_the_holder_s if self._holder else 0.0) + grace_s + _AFTER_THE_GRACE_S
        return Leaving(reason, f"{group}the teacher", within_s)
