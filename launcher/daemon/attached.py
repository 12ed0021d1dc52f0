"""A training group's side of the lease on a kept teacher.

What it writes it asks of the keeper, over the socket; what it reads are mappings of its own.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from launcher import registry
from launcher.console.terminal import LAUNCHER, Console
from launcher.console.text import seconds
from launcher.daemon import agreement, messages
from launcher.daemon.messages import Begin, Begun, Fingerprint, FromKeeper, Granted, Leaving, Refused, Waiting, Welcome
from launcher.daemon.transport import Lines, credentials
from launcher.process.job import Job
from launcher.process.signals import Signals
from launcher.process.trial import Stopped
from launcher.supervisor.ranks import Ranks
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError, DeadlineExceeded, LauncherDied
from shmbridge.shm import layout, process
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Control, Lane, Names, Shape, Token
from shmbridge.shm.status import Failure, Phase

_ANSWER_S = 30.0  # a keeper says something at once, unless it is stopped or creates memory for a group

M = TypeVar("M", bound=msgspec.Struct)


class Line:
    """A connection to a keeper, on which questions are asked one after the other."""

    def __init__(self, name: str) -> None:
        """Connect. Raises ConfigError where there is no kept teacher of this name."""
        self.name = name
        self.lines: Lines[FromKeeper] = Lines(_connect(name), messages.AT_CLIENT)
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
        """The answer. `waiting` is told again and again why there is none yet, once the keeper has said so. A keeper says
        something within `silence_s`, and answers within `within_s`.

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
            if text:
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
        if not self.lines.open:
            return []
        heard = self.lines.receive()
        for message in heard:
            if isinstance(message, Leaving):
                self.leaving = message.reason
        if self.lines.open:
            self.lines.flush()
        if not self.lines.open:
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


def _connect(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A keeper that is stopped takes nobody from its queue; this bounds the wait for a place in it.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_ANSWER_S), 0))
    try:
        with registry.socket_path(name) as path:
            connection.connect(path)
    except OSError as error:
        connection.close()
        raise ConfigError(_why_not(name, error)) from None
    if not credentials(connection).is_mine:
        connection.close()
        raise ConfigError(f"the socket of {name!r} is another user's: found uid {credentials(connection).uid}.")
    return connection


def _why_not(name: str, error: OSError) -> str:
    """What there is instead of a keeper that takes connections."""
    entries = registry.entries()
    entry = entries.get(name)
    kept = sorted(other for other, one in entries.items() if one.get("kept") and _lives(one))
    there_are = f"there are: {', '.join(kept)}" if kept else "there is none"
    start = f"Start it with `shmbridge-launch teacher start {name} --teacher MODEL`"
    if entry is None:
        return f"no teacher is kept under the name {name!r}; {there_are}. {start}."
    if not _lives(entry):
        return f"the teacher {name!r} is not kept any more: its keeper (pid {entry.get('pid')}) was killed. {start}."
    where = f"pid {entry.get('pid')}, run directory {entry.get('run') or 'not made yet'}"
    if not entry.get("kept"):
        return f"{name!r} is a run ({where}), not a kept teacher; {there_are}."
    return (
        f"the keeper of {name!r} ({where}) cannot be reached: its socket {registry.directory() / name}.sock gives "
        f"{error.strerror!r}. End it with `kill {entry.get('pid')}` and start it again."
    )


def _lives(entry: dict[str, object]) -> bool:
    pid = entry.get("pid")
    return isinstance(pid, int) and process.state(pid) not in ("gone", "zombie")


def agree(line: Line, given: dict[str, object]) -> tuple[Config, Fingerprint]:
    """The settings of a group that was `given` these. Raises ConfigError where the two sides differ in their versions."""
    welcome = line.welcome
    here = agreement.fingerprint("")
    agreement.check(line.name, welcome.fingerprint, here)
    settings = agreement.merged(config.from_json(bytes(welcome.settings)), given)
    if settings.plane == "cuda_ipc" and not settings.train.gpus:
        raise ConfigError(
            f"the replies of the kept teacher {line.name} lie in GPU memory (plane cuda_ipc), and training is on the CPU. "
            "Give --train-gpus, or start a teacher with plane=host."
        )
    return settings, agreement.fingerprint(settings.teacher.model)


def attach(line: Line, settings: Config, mine: Fingerprint, console: Console, signals: Signals) -> Attachment:
    """Take the lease; while the teacher loads, wait.

    Raises:
        ConfigError: the settings are not the kept teacher's.
        SessionInUse: another group has it.
        DeadlineExceeded: it is not free within timeouts.startup_s.
        Stopped: the user ended the launcher meanwhile.
    """
    told: list[str] = []

    def waiting(text: str) -> None:
        if text not in told:
            told.append(text)
            console.say(f"{text}; waiting")
        for number in signals.take():
            raise Stopped(number)

    granted = line.ask(messages.Attach(mine, settings), Granted, waiting, within_s=settings.timeouts.startup_s)
    return Attachment(line, granted)


class Attachment:
    """The lease. A context manager that gives it back at the end."""

    def __init__(self, line: Line, granted: Granted) -> None:
        self.session_id = granted.session
        self.generation = 0
        self.lanes: list[Lane] = []
        self.ranks = 1
        self.logs = [Path(path) for path in granted.logs]
        self.line = line
        self.ended_at: float | None = None  # monotonic seconds, when this generation's training had ended
        self.settings = config.from_json(bytes(line.welcome.settings))
        self.control = Control(Segment.attach(Names(self.session_id).control, layout.CONTROL, self.session_id))

    @property
    def shape(self) -> Shape:
        return self.control.shape

    def describe(self, settings: Config) -> None:
        self.settings = settings

    def start_generation(self) -> Token:
        """Raises ShmbridgeError: it does not fit, or the keeper is gone."""
        silence_s = self.settings.timeouts.startup_s  # in which the keeper creates the reply memory, page by page
        self.generation = self.line.ask(Begin(self.settings, self.ranks), Begun, silence_s=silence_s).generation
        self.ended_at = None
        self.control = Control(self.control.segment)
        token = Token(self.session_id, self.generation)
        self.lanes = [Lane.attach(token, self.shape, index) for index in range(self.shape.lanes)]
        return token

    def end_training(self) -> None:
        self.ended_at = self.ended_at or time.monotonic()
        self.line.lines.send(messages.End())

    def end_session(self) -> None:
        """Of this group; the teacher stays."""
        self.end_training()

    def ask_to_stop(self) -> None:
        self.line.lines.send(messages.Save())

    def fail(self, failure: Failure) -> None:
        self.line.lines.send(messages.Fail(failure))

    def failures(self) -> list[Failure]:
        """Of the ranks; of a teacher only what its keeper says, who may start another. Causes before consequences."""
        found = [failure for lane in self.lanes for record in lane.records if (failure := record.failure)]
        verdict = self.control.owner.failure
        if verdict and verdict.generation == 0:
            found.append(verdict)
        elif self.line.lost_ns:
            found.append(self._keeper_lost())
        return sorted(found, key=lambda failure: (failure.consequence, failure.at_ns))

    def _keeper_lost(self) -> Failure:
        return Failure(LAUNCHER, 0, self.line.lines.pid, "", None, None, self.line.gone, at_ns=self.line.lost_ns)

    def close(self) -> None:
        self.line.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class KeptTeachers:
    """The teachers of a lease. They are their keeper's: here they are only looked at."""

    no_witnesses: frozenset[int] = frozenset()
    jobs: Sequence[Job] = ()

    def __init__(self, attachment: Attachment, console: Console) -> None:
        self._attachment = attachment
        self._console = console
        self._told_ready = 0

    @property
    def ready(self) -> bool:
        attachment = self._attachment
        return all(record.ready == attachment.generation for record in attachment.control.teachers)

    @property
    def drained(self) -> bool:
        idle = all(record.phase is Phase.IDLE for record in self._attachment.control.teachers)
        return self.lost or (self.ready and idle)

    @property
    def ended(self) -> bool:
        return self.drained

    @property
    def asks_to_stop(self) -> str:
        return self._attachment.line.leaving

    @property
    def lost(self) -> bool:
        return self._attachment.line.lost_ns > 0 or all(record.lost for record in self._attachment.control.teachers)

    def watch(self) -> list[int]:
        line = self._attachment.line
        line.hear()
        return [line.lines.fd] if line.lines.open else []

    def serve(self, ranks: Ranks) -> None:
        """Nothing here depends on the ranks."""

    def agree(self) -> str:
        return ""

    def revive(self) -> None:
        """That the keeper does. Raises DeadlineExceeded where a teacher does not finish what a crashed generation has left."""
        ended_at, patience_s = self._attachment.ended_at, self._attachment.settings.timeouts.request_s
        if ended_at and time.monotonic() - ended_at >= patience_s and not self.drained:
            raise DeadlineExceeded(
                f"the kept teacher {self._attachment.line.name} has not finished what the crashed training has left after "
                f"{seconds(patience_s)} (timeouts.request_s); its keeper's log tells where it is."
            )

    def survives(self, found: object) -> bool:
        return False  # that it has ended is the keeper's last word

    def end(self, failed: int | None = None) -> None:
        self._attachment.end_training()

    def show_progress(self) -> None:
        generation = self._attachment.generation
        if self.ready and self._told_ready != generation:
            self._told_ready = generation
            self._console.say(f"the kept teacher {self._attachment.line.name} serves generation {generation}")

    def ended_early(self) -> None:
        return None

    def crashed_late(self, trained: bool) -> Sequence[Job]:
        return ()
