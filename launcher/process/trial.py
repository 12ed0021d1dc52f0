"""The trial of plane cuda_ipc: short-lived processes in the environments of both jobs open, read and check what a run would.

    trial ── shim ── shmbridge.plane.probe export    one for each replica, as the teacher's process will be
         └── shim ── shmbridge.plane.probe import    as the ranks will be, on each training GPU

The messages between them go through here, so that whoever dies or hangs is seen. Nothing of the trial is left when it ends.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from launcher.plan.jobs import Plan
from launcher.plan.plane_choice import GpuPair
from launcher.process import job, shim
from launcher.process.signals import STOP, Signals
from shmbridge.plane import probe
from shmbridge.plane.probe import Exported, Task, Tried
from shmbridge.shm.session import OFF

LIMIT_S = 180.0  # imports torch from a cold disk and makes CUDA contexts where the driver is not loaded yet
_END_S = 20.0  # for processes that have nothing left to do
_REAP_S = 5.0  # a process in uninterruptible sleep takes no SIGKILL until the kernel lets go of it
_PIPE_BYTES = 2**20

T = TypeVar("T")


class Command(NamedTuple):
    """What one process of the trial executes."""

    who: str  # as the user is told of it
    argv: tuple[str, ...]
    environment: Mapping[str, str]


class Stopped(BaseException):  # like KeyboardInterrupt: no check that goes on after an Exception goes on after this
    """The user ended the launcher during the trial."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number


def commands(planned: Plan, pairs: Sequence[GpuPair], base: Mapping[str, str]) -> tuple[list[Command], Command]:
    """An exporter for each replica that has a pair, and the importer: interpreters and environments of the jobs."""
    *teachers, train = planned.jobs(Path(), OFF)
    exporters = []
    for replica in dict.fromkeys(pair.replica for pair in pairs):
        spec = teachers[replica]
        count = sum(pair.replica == replica for pair in pairs)
        argv: tuple[str, ...] = (spec.argv[0], "-m", probe.__name__, "export", str(count))
        whose = spec.who if len(teachers) > 1 else f"the {spec.who}"
        exporters.append(Command(f"the trial in {whose}'s environment", argv, spec.environment(base)))
    argv = (train.argv[0], "-m", probe.__name__, "import")
    return exporters, Command("the trial in training's environment", argv, train.environment(base))


def run(
    pairs: Sequence[GpuPair],
    exporters: Sequence[Command],
    importer: Command,
    signals: Signals,
    limit_s: float = LIMIT_S,
) -> str | None:
    """None where every pair can share memory; else why not, in one line. `pairs` are sorted by replica.

    Raises:
        Stopped: a signal that ends the launcher has arrived.
    """
    trial = _Trial(exporters, importer, signals, limit_s)
    try:
        return trial.talk(pairs)
    except _Failed as failed:
        return str(failed)
    finally:
        trial.clear()


class _Failed(Exception):
    """The reason, in one line."""


class _Process:
    """One process of the trial, below its own shim."""

    def __init__(self, command: Command) -> None:
        self.who = command.who
        self.messages: deque[bytes] = deque()
        self.ended = False  # its stdout is closed, which the shim has too
        self._rest = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._popen = subprocess.Popen(
            job.shimmed(command.argv),
            env=dict(command.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        assert self._popen.stdin and self._popen.stdout
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        self.fd = self._stdout.fileno()

    def pull(self) -> None:
        """Take what it has printed. Blocks until it prints or ends."""
        data = os.read(self.fd, 65536)
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.messages.extend(probe.messages(lines))

    def send(self, message: object) -> None:
        """Never blocks: a few kilobytes for each pair of GPUs fit the pipe."""
        fcntl.fcntl(self._stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            self._stdin.write(probe.encode(message))
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which the next look at it tells

    def finish(self) -> None:
        """Tell it that nothing follows."""
        try:
            self._stdin.close()
        except BrokenPipeError:
            pass

    def fate(self) -> str | None:
        """How it ended, where that was not well."""
        code = self._popen.wait(_REAP_S)
        if code == 0:
            return None
        if code < 0:
            return f"{self.who} was killed by {signal.Signals(-code).name}"
        self._stderr.seek(0)
        lines = list(filter(str.strip, self._stderr.read().decode(errors="replace").split("\n")))
        last = f" ({lines[-1].strip()})" if lines else ""
        return f"{self.who} ended with exit code {code}{last}"

    def kill(self) -> None:
        """SIGKILL for all of it. One that has ended stays as it is."""
        self._popen.send_signal(shim.KILL_SIGNAL)

    def reap(self) -> None:
        try:
            self._popen.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            pass  # its shim ends it with the launcher, at the latest
        self.finish()
        self._stdout.close()
        self._stderr.close()


class _Trial:
    """The processes, and the messages between them."""

    def __init__(self, exporters: Sequence[Command], importer: Command, signals: Signals, limit_s: float) -> None:
        self._signals = signals
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._all: list[_Process] = []
        try:
            for command in (importer, *exporters):
                self._all.append(_Process(command))
        except BaseException:
            self.clear()
            raise
        self._importer, *self._exporters = self._all

    def talk(self, pairs: Sequence[GpuPair]) -> str | None:
        """Bring exports to the importer, and collect what it says of each; the reason, where something is wrong."""
        offered = []
        for exporter in self._exporters:
            exported = self._receive(exporter, Exported, exporter.who)
            if exported.refused:
                return exported.refused
            offered += [(exported.facts, export) for export in exported.exports]
        if len(offered) != len(pairs):
            return f"{len(offered)} exports came for {len(pairs)} pairs of GPUs"
        self._importer.send([Task(pair.device, *offer) for pair, offer in zip(pairs, offered, strict=True)])
        failed = []
        for pair in pairs:
            tried = self._receive(self._importer, Tried, f"{pair}: {self._importer.who}")
            if tried.of_jobs:
                return tried.reason
            failed += [f"{pair}: {tried.reason}"] if tried.reason else []
        self._finish()
        more = f" (and {len(failed) - 1} of {len(pairs)} pairs more)" if failed[1:] else ""
        return failed[0] + more if failed else None

    def clear(self) -> None:
        """Leave no process behind."""
        for process in self._all:
            process.kill()
        for process in self._all:
            process.reap()

    def _receive(self, process: _Process, kind: type[T], who: str) -> T:
        """Its next message."""
        self._until(lambda: bool(process.messages) or any(one.ended for one in self._all), who)
        if process.messages:
            try:
                return msgspec.json.decode(process.messages.popleft(), type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise _Failed(f"{process.who} sent a garbled message: {error}") from None
        ended = next(one for one in self._all if one.ended)
        about = who.removesuffix(process.who) if ended is process else ""
        raise _Failed(f"{about}{ended.fate() or f'{ended.who} ended before it had answered'}")

    def _finish(self) -> None:
        """Everything was read. What crashes or hangs on its way out would do so in the run."""
        ends = time.monotonic() + _END_S
        if ends < self._deadline:
            self._deadline, self._limit_s = ends, _END_S
        for process in self._all:  # the importer first: an exporter outlives whoever reads its memory
            process.finish()

            def ended(process: _Process = process) -> bool:
                return process.ended

            self._until(ended, f"{process.who} was told to end and")
            fate = process.fate()
            if fate:
                raise _Failed(fate)

    def _until(self, ready: Callable[[], bool], who: str) -> None:
        """Read what the processes print until `ready`."""
        while True:
            for number in self._signals.take():
                if number in STOP:
                    raise Stopped(number)
            if ready():
                return
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise _Failed(f"{who} gave no answer within {self._limit_s:g} s")
            poll = select.poll()
            poll.register(self._signals.fd, select.POLLIN)
            running = {process.fd: process for process in self._all if not process.ended}
            for fd in running:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(left_s * 1000):
                if fd in running:
                    running[fd].pull()
