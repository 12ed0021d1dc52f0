"""A training group's side of a kept teacher's session, and the connection that it and `teacher status` and `teacher stop` ask on.

What it writes it asks of the keeper, over the socket; what it reads are mappings of its own.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from launcher import registry
from launcher.console.terminal import Console
from launcher.console.text import seconds
from launcher.keeper import agreement, messages
from launcher.keeper.messages import Begin, Begun, FromKeeper, Leaving, Message, Refused, Waiting, Welcome
from launcher.keeper.transport import Lines
from launcher.supervisor import cause
from launcher.supervisor.ranks import Ranks
from launcher.supervisor.session_handle import SessionHandle
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError, DeadlineExceeded, LauncherDied
from shmbridge.shm import process
from shmbridge.shm.participant_record import Failure, Phase
from shmbridge.shm.session import MappedSession, Token

_ANSWER_S = 30.0  # a keeper says something at once, unless it is stopped or creates memory for a group
_BUSY_S, _SERVED_S = 0.1, 0.5

M = TypeVar("M", bound=Message)


class Connection:
    """A connection to a keeper, on which questions are asked one after the other."""

    def __init__(self, name: str, to_stop: bool = False) -> None:
        """Connect; `to_stop`, in order to stop it. Raises ConfigError where there is no kept teacher of this name."""
        self.name = name
        self.lines: Lines[FromKeeper] = Lines(_connect(name, to_stop), messages.AT_CLIENT)
        self.leaving = ""  # why the keeper ends, where it has said so
        self._heard: deque[FromKeeper] = deque()
        self._asked_at = 0.0  # monotonic seconds
        try:
            if self.lines.uid != os.geteuid():
                raise ConfigError(f"the socket of {name!r} is another user's: found uid {self.lines.uid}.")
            self.welcome = self.ask(messages.Hello(), Welcome)
        except BaseException:
            self.close()
            raise

    def ask(self, question: Message, expected: type[M]) -> M:
        """Wait for the answer to a question; raises as `answer` does."""
        self.send(question)
        while (found := self.answer(_ANSWER_S, expected)) is None:
            poll = select.poll()
            for fd, events in self.lines.watch():
                poll.register(fd, events)
            poll.poll(100)
        return found

    def send(self, question: Message) -> None:
        self.lines.send(question)
        self._asked_at = time.monotonic()

    def answer(self, patience_s: float, *expected: type[M]) -> M | None:
        """The answer to the last question, once it has come.

        Raises:
            ShmbridgeError: the keeper refuses.
            LauncherDied: it is gone, or has said nothing for `patience_s`.
        """
        self.hear()
        while self._heard:
            found = self._heard.popleft()
            if isinstance(found, expected):
                return found
            if isinstance(found, Refused):
                raise found.error()
        if not self.lines.open:
            raise LauncherDied(self.gone)
        if time.monotonic() - self._asked_at >= patience_s:
            pid, state = self.lines.pid, process.state(self.lines.pid)
            remedy = f"resume it with `kill -CONT {pid}`" if state == "stopped" else "its log tells why"
            raise LauncherDied(f"{self._keeper} has said nothing for {seconds(patience_s)}; it is {state}: {remedy}.")
        return None

    def hear(self) -> None:
        """Take what has come."""
        for message in self.lines.receive():
            if isinstance(message, Leaving):
                self.leaving = message.reason
            self._heard.append(message)
        self.lines.flush()

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
    return connection


def _why_not(name: str, error: OSError, to_stop: bool) -> str:
    """What there is instead of a keeper that takes connections."""
    entries = registry.entries()
    live = {
        other for other, entry in entries.items() if entry.pid and process.state(entry.pid) not in ("gone", "zombie")
    }
    kept = sorted(other for other in live if entries[other].kept)
    there_are = f"there are: {', '.join(kept)}" if kept else "there is none"
    remedy = f"Start it with `shmbridge-launch teacher start {name} --teacher MODEL`"
    if to_stop:
        remedy = "There is nothing to stop"
    if name not in entries:
        return f"no teacher is kept under the name {name!r}; {there_are}. {remedy}."
    entry = entries[name]
    if name not in live:
        return f"the teacher {name!r} is not kept any more: its keeper (pid {entry.pid}) was killed. {remedy}."
    if not entry.kept:
        return f"{name!r} is a run ({entry.where}), not a kept teacher; {there_are}."
    return (
        f"the keeper of {name!r} ({entry.where}) cannot be reached: its socket {registry.directory() / name}.sock gives "
        f"{error.strerror!r}. End it with `kill {entry.pid}` and start it again."
    )


def agree(connection: Connection, given: dict[str, object]) -> Config:
    """The settings of a group that was `given` these. Raises ConfigError where the two sides differ in their versions."""
    welcome = connection.welcome
    agreement.check_versions(connection.name, welcome.versions, agreement.versions())
    settings = agreement.merged(config.from_json(bytes(welcome.settings)), given)
    if settings.plane == "cuda_ipc" and not settings.train.gpus:
        raise ConfigError(
            f"the replies of the kept teacher {connection.name} lie in GPU memory (plane cuda_ipc), and training is on the CPU. "
            "Give --train-gpus, or start a teacher with plane=host."
        )
    return settings


class RemoteSession(SessionHandle):
    """A kept teacher's session, held from the first `begin` until the connection is closed."""

    view: MappedSession

    def __init__(self, connection: Connection, settings: Config, console: Console) -> None:
        """`settings` are the group's."""
        super().__init__()
        self.connection = connection
        self.logs: list[Path] = []  # of the teachers
        self._tokenizer = agreement.tokenizer(settings.teacher.model)
        self._console = console
        self._asks_since: float | None = None  # monotonic seconds, for a generation
        self._ask_at = 0.0  # monotonic seconds; infinite while an answer is due
        self._told: set[str] = set()
        self._told_ready = 0  # of this generation
        self.done = False

    def begin(self, settings: Config, ranks: int) -> Token | None:
        """Asks the keeper, and asks again while a teacher finishes what the group before has left.

        Raises:
            ConfigError: the settings are not the kept teacher's.
            SessionInUse: another group has it.
            PlanError: the replies do not fit.
            DeadlineExceeded: it is not free within timeouts.startup_s.
            LauncherDied: the keeper is gone, or has said nothing for timeouts.startup_s, in which it may have to create the reply
                memory, page by page.
        """
        now, startup_s = time.monotonic(), settings.timeouts.startup_s
        if self._asks_since is None:
            self._asks_since = self._ask_at = now
        if now >= self._ask_at:
            self._ask_at = float("inf")
            self.connection.send(Begin(settings, ranks, self._tokenizer))
        found = self.connection.answer(startup_s, Begun, Waiting)
        if isinstance(found, Waiting):
            if found.text not in self._told:
                self._told.add(found.text)
                self._console.say(f"{found.text}; waiting")
            if now - self._asks_since >= startup_s:
                raise DeadlineExceeded(
                    f"{found.text} after {seconds(startup_s)} (timeouts.startup_s); `shmbridge-launch teacher status "
                    f"{self.connection.name}` and its log tell more. Wait longer with a larger timeouts.startup_s."
                )
            self._ask_at = now + _BUSY_S
        if not isinstance(found, Begun):
            return None
        self._asks_since = None
        if self.logs:
            self.view.update()
        else:
            self.view = MappedSession(found.session)
        self.logs = [Path(path) for path in found.logs]
        self.ranks = Ranks(self.view.lanes, ranks, settings.teacher.serve_until == "closed")
        return Token(found.session, found.generation)

    def end(self) -> None:
        self.connection.send(messages.End())

    def save(self) -> None:
        self.connection.send(messages.Save())

    def fail(self, failure: Failure) -> None:
        self.connection.send(messages.Fail(failure))

    def close(self, trained: bool = False, failed: int | None = None) -> None:
        """Of this group; the teacher stays."""
        self.done = True
        self.end()

    @property
    def lost(self) -> bool:
        return not self.connection.lines.open or all(record.lost for record in self.view.control.teachers)

    @property
    def ended(self) -> bool:
        idle = all(record.phase is Phase.IDLE for record in self.view.control.teachers)
        return self.lost or (self._ready and idle)

    @property
    def _ready(self) -> bool:
        return all(record.ready == self.view.generation for record in self.view.control.teachers)

    @property
    def patience_s(self) -> float:
        return _SERVED_S if self._told_ready == self.view.generation and not self.done else _BUSY_S

    def watch(self) -> Iterable[tuple[int, int]]:
        return [*super().watch(), *self.connection.lines.watch()]

    def step(self, now: float) -> None:
        super().step(now)
        self.connection.hear()
        self.leaving = self.connection.leaving
        generation = self.view.generation
        if self._ready and self._told_ready != generation:
            self._told_ready = generation
            self._console.say(f"the kept teacher {self.connection.name} serves generation {generation}")
        if not self.connection.lines.open and not self.failure and not self.view.control.owner.failure:
            gone = cause.of_launcher(self.connection.gone, 1)
            self.failure = msgspec.structs.replace(gone, pid=self.connection.lines.pid)
