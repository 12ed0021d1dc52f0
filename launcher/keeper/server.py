"""The keeper's socket: who comes, what they ask for, and which training group holds the session.

It takes only processes of this user, and waits for none of them. One that says garbage is dropped, and one too many is refused.

One group at a time holds the session: it may begin while the teachers load, and is told to ask again while they finish what the group
before it has left.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from launcher.console.text import listed, seconds
from launcher.hang.monitor import Monitor
from launcher.keeper import agreement, messages
from launcher.keeper.messages import (
    Begin,
    Begun,
    End,
    Fail,
    Hello,
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
from launcher.keeper.transport import BACKLOG, Lines
from launcher.planning.jobs import TEACHER, Plan
from launcher.process.signals import STOP
from launcher.supervisor import cause, report
from launcher.supervisor.cause import Cause
from launcher.supervisor.hosted_session import LOADING_PHASES, HostedSession, State
from launcher.supervisor.loop import EventLoop
from shmbridge import config
from shmbridge.errors import ConfigError, PlanError
from shmbridge.shm.participant_record import Phase

Visitor = Lines[ToKeeper]
_MOST_VISITORS = 256
_FDS_OF_A_RANK = 3  # in this process: mappings of its lane and its replies, its pidfd
_SPARE_FDS = _MOST_VISITORS + 64
_BUSY_S = 0.1
_AFTER_THE_GRACE_S = 20.0  # more than SIGKILL, clearing up and the last lines of output take
_NEVER = float("inf")


class _Group(msgspec.Struct):
    """The training group that holds the session."""

    visitor: Visitor
    since: float  # seconds since the epoch
    run: str  # directory
    generation: int
    ranks: int
    ended: bool = False  # it has said that its generation is over


class Listener:
    """Serves the socket of one kept teacher, and decides when its session is closed."""

    done = True  # for the loop: it ends with the session

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
        self._plan = plan
        self._session = session
        self._run = run
        self._loop = loop
        self._console = loop.console
        self._listener = listener
        self._tell_ready = ready
        self._teacher = f"the kept teacher {plan.config.name}"
        self._tokenizer = agreement.tokenizer(plan.config.teacher.model)
        self._since = time.time()
        self._monitor = Monitor(session.view, plan.config, run, loop.console)
        self._visitors: list[Visitor] = []  # the oldest first
        self._group: _Group | None = None
        self._was_ready = False
        self._ending = ""  # why this keeper ends
        self._cause: Cause | None = None  # where it ends for a failure of a teacher
        self._stopped_by: signal.Signals | None = None
        self._close_at = _NEVER  # monotonic seconds: the group has had its time to stop

    # As the loop sees it

    @property
    def patience_s(self) -> float:
        return _BUSY_S if self._ending else _NEVER

    def watch(self) -> Iterable[tuple[int, int]]:
        yield self._listener.fileno(), select.POLLIN
        for visitor in self._visitors:
            yield from visitor.watch()

    def step(self, now: float) -> None:
        for visitor in self._visitors:
            for message in visitor.receive():
                self._hear(visitor, message)
            visitor.flush()
        self._visitors = [visitor for visitor in self._visitors if visitor.open]
        if self._group and not self._group.visitor.open:
            self._let_go(self._group)
        self._accept()  # once those who have gone have made room
        if not self._ending:
            self._look_at_teachers(now)
        elif not self._session.done and (self._group is None or now >= self._close_at):
            if self._group:
                self._session.fail(cause.of_launcher("the kept teacher was stopped", 1))
            self._close()

    def on_signal(self, number: signal.Signals) -> None:
        if number not in STOP:
            return
        if not self._ending:
            self._stopped_by = number
            self._leave(f"{self._teacher} is stopped by {number.name}")
        elif number == signal.SIGINT:
            self._session.close()  # whatever the group may still need
            self._loop.kill()

    def conclude(self, elapsed_s: float) -> int:
        """Tell how it ended; the exit code, which is not 0 where the teachers were never ready."""
        for visitor in self._visitors:
            visitor.close()
        if self._cause:
            return report.conclude(self._cause, self._plan, self._loop, elapsed_s, self._run)
        answered = f"{self._session.answered} requests answered"
        self._console.say(f"{self._teacher} has ended after {seconds(elapsed_s)}, {answered}")
        if self._stopped_by:
            return 128 + self._stopped_by
        return 0 if self._was_ready else 1

    # The teachers

    def _look_at_teachers(self, now: float) -> None:
        """Tell when they have loaded, report where one stands still, end where one cannot be. How ranks fail is the matter of their
        own launcher."""
        if self._session.ready and not self._was_ready:
            self._was_ready = True
            train = self._plan.config.train
            group = f"--train-gpus {train.gpus}" if train.gpus else f"--cpu {train.cpu_ranks}"
            self._console.say(
                f"ready; train with: shmbridge-launch --attach {self._plan.config.name} {group} -- train.py"
            )
            self._tell_ready()
        overdue = self._monitor.step(now)
        if overdue and overdue.who.role == TEACHER and not self._session.failure:
            self._session.failure = cause.of_overdue(overdue)
        found = self._session.failure
        if found:
            self._leave(f"{self._teacher} ends: {found.sentence}", found)

    # Who comes

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody (else) there; or they have gone, or there are no file descriptors left
                return
            visitor = Lines(connection, messages.AT_KEEPER)
            if visitor.uid != os.geteuid():
                visitor.close()
            elif len(self._visitors) >= _MOST_VISITORS:
                full = f"{self._teacher} has {_MOST_VISITORS} connections, the most: end some of them."
                visitor.send(Refused("held", full))
                visitor.close()
            else:
                self._visitors.append(visitor)

    def _hear(self, visitor: Visitor, message: ToKeeper) -> None:
        group = self._group
        match message:
            case Hello():
                visitor.send(Welcome(agreement.versions(), msgspec.Raw(config.to_json(self._plan.config))))
            case Look():
                visitor.send(self._standing())
            case Stop() if group and not message.force:
                visitor.send(self._held(group, "End that run first, or end both with --force."))
            case Stop() if self._ending:
                visitor.send(self._farewell())
            case Stop():
                self._leave(f"{self._teacher} is stopped (by pid {visitor.pid})")
            case Begin():
                visitor.send(self._begin(visitor, message))
            case _ if not group or visitor is not group.visitor:
                visitor.close()
            case Save():
                self._session.save()
            case End() | Fail():
                group.ended = True
                if isinstance(message, Fail):
                    self._session.fail(message.failure)
                self._session.end()

    # Generations

    def _begin(self, visitor: Visitor, asked: Begin) -> Begun | Waiting | Refused:
        group = self._group
        if self._ending:
            return Refused("held", f"{self._ending}.")
        if group and visitor is not group.visitor:
            return self._held(group, "One group at a time: wait for it to end, or end it.")
        try:
            tokenizers = self._tokenizer, asked.tokenizer
            agreement.check_settings(self._plan.config.name, self._plan.config, asked.settings, tokenizers)
            self._check_ranks(asked.ranks)
            token = self._session.begin(asked.settings, asked.ranks)
        except PlanError as error:
            remedy = f"Fewer ranks need less, or start {self._teacher} again with other settings."
            return Refused("memory", f"{error} {remedy}")
        except ConfigError as error:
            return Refused("settings", str(error))
        if token is None:
            return Waiting(f"{self._teacher} is {self._state}")
        since = group.since if group else time.time()
        self._group = _Group(visitor, since, asked.settings.run_dir, token.generation, asked.ranks)
        self._console.say(
            f"generation {token.generation}: {asked.ranks} ranks of pid {visitor.pid}, run {asked.settings.run_dir}"
        )
        return Begun(
            token.session_id, token.generation, tuple(str(job.spec.log.resolve()) for job in self._session.jobs)
        )

    def _check_ranks(self, ranks: int) -> None:
        replicas = len(self._plan.teachers)
        if ranks < replicas:
            raise ConfigError(f"{ranks} ranks cannot keep {replicas} replicas of the teacher busy.")
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max(0, limit - len(os.listdir("/proc/self/fd")) - _SPARE_FDS) // _FDS_OF_A_RANK
        if ranks > most:
            raise ConfigError(
                f"{ranks} ranks need {_FDS_OF_A_RANK} file descriptors each in the keeper, whose limit is {limit} (ulimit -n): "
                f"{most} ranks at most. Train with fewer, or start {self._teacher} again under a higher limit."
            )

    def _let_go(self, group: _Group) -> None:
        """The connection of the group that held the session is closed."""
        self._group = None
        if not group.ended:
            why = f"the launcher of this training group (pid {group.visitor.pid}) is gone: killed?"
            self._session.fail(cause.of_launcher(why, 1))
        self._session.end()
        how = "has ended" if group.ended else "is gone without a word; its generation is ended"
        stays = "" if self._ending else "; the teacher stays"
        self._console.say(f"the training group of pid {group.visitor.pid} {how}{stays}")

    # Telling

    def _held(self, group: _Group, remedy: str) -> Refused:
        who = f"pid {group.visitor.pid} (run directory {group.run}) since {_time(group.since)}"
        return Refused("held", f"{self._teacher} is held by {who}. {remedy}")

    @property
    def _state(self) -> str:
        """One phrase: idle; held; loading (loading, 3 of 14)."""
        if self._ending:
            return "being stopped"
        before = (*LOADING_PHASES, Phase.OFFERED)
        loading = next((record for record in self._session.view.control.teachers if record.phase in before), None)
        if self._session.state is State.LOADING and loading:
            done, total = loading.progressed
            share = f", {done} of {total}" if total else ""
            return f"loading{' again' if self._was_ready else ''} ({loading.phase}{share})"
        if self._group:
            return "held"
        return "idle" if self._session.state is State.IDLE else "finishing what the last training group left"

    def _standing(self) -> Standing:
        settings, view, group = self._plan.config, self._session.view, self._group
        gpus = ",".join(str(gpu.number) for own in self._plan.teachers for gpu in own)
        pids = [str(record.identity.pid) if record.identity else "none" for record in view.control.teachers]
        answered = self._session.answered
        rows = [
            ("state", self._state),
            ("teacher", f"{settings.teacher.model} on {f'GPU {gpus}' if gpus else 'the CPU'}, pid {listed(pids)}"),
            ("plane", settings.plane),
            ("keeper", f"pid {os.getpid()}, since {_since(self._since)}"),
            ("session", view.session_id),
            ("run", str(self._run.resolve())),
            ("answered", f"{answered} request{'s' if answered != 1 else ''}"),
            ("held by", f"pid {group.visitor.pid}, since {_since(group.since)}" if group else "nobody"),
        ]
        if group:
            ranks = f"{group.ranks} rank{'s' if group.ranks > 1 else ''}"
            rows.append(("", f"generation {group.generation}, {ranks}, run {group.run}"))
        return Standing(tuple(rows))

    # Leaving

    def _leave(self, reason: str, found: Cause | None = None) -> None:
        """End, and tell everyone: at once after a failure of a teacher, which the group reads in its record; else once the group has had
        its time to save and to stop."""
        self._ending, self._cause = reason, found
        self._console.say(f"{reason}; stopping")
        for visitor in self._visitors:
            if not (found and self._group and visitor is self._group.visitor):
                visitor.send(self._farewell())
        if found:
            self._loop.logs.failed = True
            self._session.fail(found)
            self._close(found.rank if found.role == TEACHER else None)
        elif self._group:
            self._close_at = time.monotonic() + self._of_the_group_s
        else:
            self._close()

    def _close(self, failed: int | None = None) -> None:
        self._session.close(failed=failed)
        self._loop.stop()

    @property
    def _of_the_group_s(self) -> float:
        """What a group that is to end is given to save and to stop."""
        timeouts = self._session.view.settings.timeouts
        return timeouts.save_s + 2 * timeouts.shutdown_s if self._group else 0.0

    def _farewell(self) -> Leaving:
        group = f"the training group of pid {self._group.visitor.pid} and " if self._group else ""
        within_s = self._of_the_group_s + self._plan.config.timeouts.shutdown_s + _AFTER_THE_GRACE_S
        return Leaving(self._ending, f"{group}the teacher", within_s)


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _since(at: float) -> str:
    return f"{_time(at)} ({seconds(max(0.0, time.time() - at))})"
