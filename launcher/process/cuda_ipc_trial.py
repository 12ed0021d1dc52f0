"""The trial of plane cuda_ipc: short-lived processes in the environments of both jobs open, read and check what a run would.

    trial ── shim ── shmbridge.plane.cuda_ipc_probe export    one for each replica, as the teacher's process will be
         │                    │ stdout to stdin
         └── shim ── shmbridge.plane.cuda_ipc_probe import    as the replica's ranks will be, on each training GPU

An importer prints one line for each step. A thread waits for each process, so whoever dies or hangs is seen. Nothing of the
trial is left when it ends.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from launcher.planning.jobs import Plan
from launcher.planning.plane_choice import GpuPair
from launcher.process import job, shim
from launcher.process.signals import Signals
from shmbridge.plane import cuda_ipc_probe
from shmbridge.shm.session import OFF

LIMIT_S = 180.0  # imports torch from a cold disk and makes CUDA contexts where the driver is not loaded yet
_END_S = 20.0  # for processes that have nothing left to do
_REAP_S = 5.0  # a process in uninterruptible sleep takes no SIGKILL until the kernel lets go of it
_LOOK_S = 0.1  # between two looks at signals and at the deadline


class Command(NamedTuple):
    """What one process of the trial executes."""

    who: str  # as the user is told of it
    argv: tuple[str, ...]
    environment: Mapping[str, str]


def commands(planned: Plan, pairs: Sequence[GpuPair], base: Mapping[str, str]) -> tuple[list[Command], Command]:
    """An exporter for each replica that has a pair, and the importer: interpreters and environments of the jobs."""
    *teachers, train = planned.jobs(Path(), OFF)
    exporters = []
    for replica in dict.fromkeys(pair.replica for pair in pairs):
        spec = teachers[replica]
        whose = spec.who if len(teachers) > 1 else f"the {spec.who}"
        argv = (spec.argv[0], "-m", cuda_ipc_probe.__name__, "export")
        exporters.append(Command(f"the trial in {whose}'s environment", argv, spec.environment(base)))
    argv = (train.argv[0], "-m", cuda_ipc_probe.__name__, "import")
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
    trial = _Trial(signals, limit_s)
    try:
        for exporter, (_, own) in zip(exporters, groupby(pairs, key=lambda pair: pair.replica), strict=True):
            trial.start(exporter, importer, tuple(own))
        reasons = trial.answers()
        trial.finish()
    except _Failed as failed:
        return str(failed)
    finally:
        trial.clear()
    wrong = [f"{pair}: {reasons[pair]}" for pair in pairs if reasons[pair]]
    more = f" (and {len(wrong) - 1} of {len(pairs)} pairs more)" if wrong[1:] else ""
    return wrong[0] + more if wrong else None


class _Failed(Exception):
    """The reason, in one line."""


class _Process:
    """One process of the trial, below its own shim."""

    def __init__(self, command: Command, arguments: Sequence[str], stdin: int, stdout: int) -> None:
        self.who = command.who
        self.steps: deque[str | GpuPair] = deque()  # what an importer has not answered yet: of a process, or of a pair
        self.ended = False
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.popen = subprocess.Popen(
            job.shimmed((*command.argv, *arguments)),
            env=dict(command.environment),
            stdin=stdin,
            stdout=stdout,
            stderr=self.stderr,
            start_new_session=True,
        )

    def watch(self, events: _Events) -> None:
        """Put each of its messages into `events`, and None once it has ended."""
        if self.popen.stdout:
            with self.popen.stdout as lines:
                for message in cuda_ipc_probe.messages(lines):
                    events.put((self, message))
        self.popen.wait()
        events.put((self, None))

    def fate(self) -> str | None:
        """Why its end is the reason, in one line; None where it has ended well, with nothing left to do."""
        code, stdin = self.popen.returncode, self.popen.stdin
        about = f"{self.steps[0]}: " if self.steps and isinstance(self.steps[0], GpuPair) else ""
        if code == 0:
            early = self.steps or (stdin and not stdin.closed)
            return f"{about}{self.who} ended before it had answered" if early else None
        if code < 0:
            return f"{about}{self.who} was killed by {signal.Signals(-code).name}"
        self.stderr.seek(0)
        lines = list(filter(str.strip, self.stderr.read().decode(errors="replace").split("\n")))
        last = f" ({lines[-1].strip()})" if lines else ""
        return f"{about}{self.who} ended with exit code {code}{last}"


_Events = queue.SimpleQueue[tuple[_Process, bytes | None]]


class _Trial:
    """The processes of all replicas, and what their importers answer."""

    def __init__(self, signals: Signals, limit_s: float) -> None:
        self._signals = signals
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._exporters: list[_Process] = []
        self._importers: list[_Process] = []
        self._events: _Events = queue.SimpleQueue()

    def start(self, exporter: Command, importer: Command, pairs: Sequence[GpuPair]) -> None:
        """Start the two processes of a replica."""
        read, write = os.pipe()
        with open(read), open(write, "w"):
            devices = [str(pair.device) for pair in pairs]
            self._exporters.append(_Process(exporter, devices, subprocess.PIPE, write))
            self._importers.append(_Process(importer, (), read, subprocess.PIPE))
        self._importers[-1].steps.extend((exporter.who, importer.who, *pairs))
        for process in (self._exporters[-1], self._importers[-1]):
            threading.Thread(target=process.watch, args=(self._events,), daemon=True).start()

    def answers(self) -> dict[str | GpuPair, str | None]:
        """What the importers say of every step: None, or why it went wrong."""
        found: dict[str | GpuPair, str | None] = {}
        while left := [importer for importer in self._importers if importer.steps]:
            step = left[0].steps[0]
            self._take(step if isinstance(step, str) else f"{step}: {left[0].who}", found)
        return found

    def finish(self) -> None:
        """Everything was read. What crashes or hangs on its way out would do so in the run."""
        ends = time.monotonic() + _END_S
        if ends < self._deadline:
            self._deadline, self._limit_s = ends, _END_S
        for process in (*self._importers, *self._exporters):  # an exporter outlives whoever reads its memory
            if process.popen.stdin:
                process.popen.stdin.close()
            while not process.ended:
                self._take(f"{process.who} was told to end and", {})

    def clear(self) -> None:
        """Leave no process behind."""
        for process in (*self._importers, *self._exporters):
            process.popen.send_signal(shim.KILL_SIGNAL)
        for process in (*self._importers, *self._exporters):
            with suppress(subprocess.TimeoutExpired):  # its shim ends it with the launcher, at the latest
                process.popen.wait(_REAP_S)
            if process.popen.stdin:
                process.popen.stdin.close()
            process.stderr.close()

    def _take(self, who: str, found: dict[str | GpuPair, str | None]) -> None:
        """Wait for `who`: put the next answer of an importer into `found`, or note that a process has ended."""
        process, message = self._next_event(who)
        if message is None:
            process.ended = True
            reason = process.fate()
            if reason:
                raise _Failed(self._fate_of_exporter(process) or reason)
            return
        if not process.steps:
            raise _Failed(f"{process.who} sent more answers than it was asked for")
        step = process.steps.popleft()
        try:
            reason = found[step] = msgspec.json.decode(message, type=cuda_ipc_probe.Answer).reason
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Failed(f"{process.who} sent a garbled message: {error}") from None
        if reason and isinstance(step, str):  # no pair of GPUs can do what this process cannot
            raise _Failed(reason)

    def _fate_of_exporter(self, process: _Process) -> str | None:
        """Why the exporter of an importer has ended, if that is why the importer ended: its input ended early."""
        if process not in self._importers or process.popen.returncode != 0:
            return None
        exporter = self._exporters[self._importers.index(process)]
        with suppress(subprocess.TimeoutExpired):
            exporter.popen.wait(_REAP_S)
            return exporter.fate()
        return None

    def _next_event(self, who: str) -> tuple[_Process, bytes | None]:
        while True:
            self._signals.check()
            if time.monotonic() >= self._deadline:
                raise _Failed(f"{who} gave no answer within {self._limit_s:g} s")
            with suppress(queue.Empty):
                return self._events.get(timeout=_LOOK_S)
