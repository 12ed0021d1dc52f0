"""A training group's side of a kept teacher's session, and the connection that it and `teacher status` and `teacher stop` ask on.

What it writes it asks of the keeper, over the socket; what it reads are mappings of its own.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from launcher import registry
from launcher.console.terminal import Console
from launcher.console.text import seconds
from launcher.keeper import agreement, messages
from launcher.keeper.messages import Begin, Begun, Fingerprint, FromKeeper, Leaving, Refused, Waiting, Welcome
from launcher.keeper.transport import Lines, credentials
from launcher.process.signals import STOP, Signals
from launcher.process.trial import Stopped
from launcher.supervisor import cause
from launcher.supervisor.handle import SessionHandle, State, state_of
from launcher.supervisor.ranks import Ranks
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError, DeadlineExceeded, LauncherDied
from shmbridge.shm import process
from shmbridge.shm.record import Failure, Phase
from shmbridge.shm.session import MappedSession, Token

_ANSWER_S = 30.0  # a keeper says something at once, unless it is stopped or creates memory for a group
_BUSY_S, _SERVED_S = 0.1, 0.5

M = TypeVar("M", bound=msgspec.Struct)


class Connection:
    """A connection to a keeper, on which questions are asked one after the other."""

    def __init__(self, name: str, to_stop: bool = False) -> None:
        """Connect; `to_stop`, in order to stop it. Raises ConfigError where there is no kept teacher of this name."""
        self.name = name
        self.lines: Lines[FromKeeper] = Lines(_connect(name, to_stop), messages.AT_CLIENT)
        self.leaving = ""  # why the keeper ends, where it has said so
        self.lost_ns = 0  # CLOCK_MONOTONIC, when the keeper was seen to be gone
        self.welcome = self.ask(messages.Hello(), Welcome)

    def ask(
        self,
        question: msgspec.Struct,
        expected: type[M],
        waiting: Callable[[str], None] = lambda text: None,
        silence_s: float = _ANSWER_S,
        within_s: float = float("inf"),
    ) -> M:
        """The answer. `waiting` is told again and again why there is none yet; nothing until the keeper has said why. A keeper
        says something within `silence_s`, and answers within `within_s`.

        Raises:
            ShmbridgeError: the keeper refuses.
            DeadlineExceeded: it has only ever said why there is no answer yet.
            LauncherDied: it is gone, or says nothing.
        """
        self.lines.send(question)
        began = heard = time.monotonic()
        text = ""
        while self.lines.open and time.monotonic() - heard < silence_s:
            poll = select.poll()
            poll.register(self.lines.fd, select.POLLIN)
            poll.poll(100)
            for answer in self.hear():
                if isinstance(answer, expected):
                    return answer
                if isinstance(answer, Refused):
                    raise answer.error()
                if isinstance(answer, Waiting):
                    text, heard = answer.text, time.monotonic()
            waiting(text)
            if time.monotonic() - began >= within_s:
                raise DeadlineExceeded(
                    f"{text} after {seconds(within_s)} (timeouts.startup_s); `shmbridge-launch teacher status {self.name}` and its "
                    "log tell more. Wait longer with a larger timeouts.startup_s."
                )
        if not self.lines.open:
            raise LauncherDied(self.gone)
        state = process.state(self.lines.pid)
        remedy = f"resume it with `kill -CONT {self.lines.pid}`" if state == "stopped" else "its log tells why"
        raise LauncherDied(f"{self._keeper} has said nothing for {seconds(silence_s)}; it is {state}: {remedy}.")

    def hear(self) -> list[FromKeeper]:
        """What has come; whether the keeper ends, or is gone, is noted."""
        heard = self.lines.receive()
        for message in heard:
            if isinstance(message, Leaving):
                self.leaving = message.reason
        if self.lines.open:
            self.lines.flush()
        if not self.lines.open and not self.lost_ns:  # a send may have been what found it gone
            self.lost_ns = time.monotonic_ns()
        return heard

    @property
    def gone(self) -> str:
        return f"{self._keeper} is gone{f': {self.leaving}' if self.leaving else ' without a word: killed?'}"

    @property
    def _keeper(self) -> str:
        return f"the keeper of the teacher {self.name} (pid {self.lines.pid})"

    def close(self) -> None:
        self.lines.close()


def _connect(name: str, to_stop: bool) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A keeper that is stopped takes nobody from its queue; this bounds the wait for a place in it.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_ANSWER_S), 0))
    try:
        with registry.socket_path(name) as path:
            connection.connect(path)
    except OSError as error:
        connection.close()
        raise ConfigError(_why_not(name, error, to_stop)) from None
    if not credentials(connection).is_mine:
        connection.close()
        raise ConfigError(f"the socket of {name!r} is another user's: found uid {credentials(connection).uid}.")
    return connection


def _why_not(name: str, error: OSError, to_stop: bool) -> str:
    """What there is instead of a keeper that takes connections."""
    entries = registry.entries()
    kept = sorted(other for other, entry in entries.items() if entry.kept and _lives(entry))
    there_are = f"there are: {', '.join(kept)}" if kept else "there is none"
    remedy = f"Start it with `shmbridge-launch teacher start {name} --teacher MODEL`"
    if to_stop:
        remedy = "There is nothing to stop"
    if name not in entries:
        return f"no teacher is kept under the name {name!r}; {there_are}. {remedy}."
    entry = entries[name]
    if not _lives(entry):
        return f"the teacher {name!r} is not kept any more: its keeper (pid {entry.pid}) was killed. {remedy}."
    if not entry.kept:
        return f"{name!r} is a run ({entry.where}), not a kept teacher; {there_are}."
    return (
        f"the keeper of {name!r} ({entry.where}) cannot be reached: its socket {registry.directory() / name}.sock gives "
        f"{error.strerror!r}. End it with `kill {entry.pid}` and start it again."
    )


def _lives(entry: registry.Entry) -> bool:
    return entry.pid > 0 and process.state(entry.pid) not in ("gone", "zombie")


def agree(connection: Connection, given: dict[str, object]) -> tuple[Config, Fingerprint]:
    """The settings of a group that was `given` these. Raises ConfigError where the two sides differ in their versions."""
    welcome = connection.welcome
    here = agreement.fingerprint("")
    agreement.check(connection.name, welcome.fingerprint, here)
    settings = agreement.merged(config.from_json(bytes(welcome.settings)), given)
    if settings.plane == "cuda_ipc" and not settings.train.gpus:
        raise ConfigError(
            f"the replies of the kept teacher {connection.name} lie in GPU memory (plane cuda_ipc), and training is on the CPU. "
            "Give --train-gpus, or start a teacher with plane=host."
        )
    return settings, agreement.fingerprint(settings.teacher.model)


class RemoteSession(SessionHandle):
    """A kept teacher's session, held from the first `begin` until the connection is closed."""

    view: MappedSession

    def __init__(self, connection: Connection, mine: Fingerprint, console: Console, signals: Signals) -> None:
        """`mine` is what must be the same on both sides. `signals` end the wait for a generation."""
        super().__init__()
        self.connection = connection
        self.logs: list[Path] = []  # of the teachers
        self._mine = mine
        self._console = console
        self._signals = signals
        self._told: set[str] = set()
        self._told_ready = 0  # of this generation
        self._closed = False

    def begin(self, settings: Config, ranks: int) -> Token:
        """Also waits while a teacher finishes what the group before has left.

        Raises:
            ConfigError: the settings are not the kept teacher's.
            SessionInUse: another group has it.
            PlanError: the replies do not fit.
            DeadlineExceeded: it is not free within timeouts.startup_s.
            Stopped: the user ended the launcher meanwhile.
            LauncherDied: the keeper is gone.
        """
        startup_s = settings.timeouts.startup_s  # in which the keeper may have to create the reply memory, page by page
        question = Begin(self._mine, settings, ranks)
        begun = self.connection.ask(question, Begun, self._wait, silence_s=startup_s, within_s=startup_s)
        if self.logs:
            self.view.update()
        else:
            self.view = MappedSession(begun.session)
        self.logs = [Path(path) for path in begun.logs]
        self.ranks = Ranks(self.view.lanes, ranks, settings.teacher.serve_until == "closed")
        return Token(begun.session, begun.generation)

    def _wait(self, text: str) -> None:
        if text and text not in self._told:
            self._told.add(text)
            self._console.say(f"{text}; waiting")
        for number in self._signals.take():
            if number in STOP:
                raise Stopped(number)

    def end(self) -> None:
        self.connection.lines.send(messages.End())

    def save(self) -> None:
        self.connection.lines.send(messages.Save())

    def fail(self, failure: Failure) -> None:
        self.connection.lines.send(messages.Fail(failure))

    def close(self, trained: bool = False, failed: int | None = None) -> None:
        """Of this group; the teacher stays."""
        self._closed = True
        self.end()

    @property
    def state(self) -> State:
        return state_of(self.view.control, self.view.generation)

    @property
    def leaving(self) -> str:
        return self.connection.leaving

    @property
    def lost(self) -> bool:
        return self.connection.lost_ns > 0 or all(record.lost for record in self.view.control.teachers)

    @property
    def ended(self) -> bool:
        idle = all(record.phase is Phase.IDLE for record in self.view.control.teachers)
        return self.lost or (self._ready and idle)

    @property
    def _ready(self) -> bool:
        return all(record.ready == self.view.generation for record in self.view.control.teachers)

    @property
    def done(self) -> bool:
        return self._closed

    @property
    def patience_s(self) -> float:
        return _SERVED_S if self._told_ready == self.view.generation and not self._closed else _BUSY_S

    def watch(self) -> Iterable[tuple[int, int]]:
        lines = self.connection.lines
        return [*super().watch(), *([(lines.fd, select.POLLIN)] if lines.open else [])]

    def step(self, now: float) -> None:
        super().step(now)
        self.connection.hear()
        generation = self.view.generation
        if self._ready and self._told_ready != generation:
            self._told_ready = generation
            self._console.say(f"the kept teacher {self.connection.name} serves generation {generation}")
        if self.connection.lost_ns and not self.view.control.owner.failure:
            gone = cause.of_launcher(self.connection.gone, 1)
            self.failure = self.failure or msgspec.structs.replace(gone, pid=self.connection.lines.pid)
