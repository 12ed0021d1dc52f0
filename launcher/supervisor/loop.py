"""The one loop of a launcher: it sleeps until a process, a socket or a signal has something to tell, then steps a session and what
drives it."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from launcher.console.logs import Logs
from launcher.console.terminal import Console
from launcher.plan import machine
from launcher.plan.jobs import JobSpec
from launcher.process import job
from launcher.process.job import Job
from launcher.process.signals import Signals
from launcher.supervisor.teardown import Teardown

_SHORTEST_S, _BEHIND_S = 0.05, 0.1  # after log lines were shown; while the terminal takes none
_SHOW_S = 5.0


class Part(Protocol):
    """What the loop steps."""

    @property
    def done(self) -> bool:
        """Nothing is left to do once every process has ended."""

    @property
    def patience_s(self) -> float:
        """How long it may be left alone while none of its file descriptors is ready."""

    def watch(self) -> Iterable[tuple[int, int]]:
        """File descriptors, with events of select.poll."""

    def step(self, now: float) -> None:
        """Look, and do what is due; `now`: monotonic seconds."""


class Driver(Part, Protocol):
    """The part that decides how the launcher ends."""

    def on_signal(self, number: signal.Signals) -> None: ...
    def conclude(self, elapsed_s: float) -> int:
        """Tell how it ended; the exit code."""


class EventLoop:
    """The jobs of a launcher with their logs, and the signals that it gets."""

    def __init__(self, base: Mapping[str, str], logs: Logs, console: Console, signals: Signals, grace_s: float) -> None:
        """Jobs are started with the environment `base`, and have `grace_s` to end when they are told to."""
        self.jobs: dict[str, Job] = {}
        self.logs = logs
        self.console = console
        self.teardown = Teardown(self.jobs, grace_s, console)
        self._base = base
        self._signals = signals
        self._oom_kills_before = machine.oom_kills()

    @property
    def oom_kills(self) -> int | None:
        """How many processes the kernel has killed for want of memory since the start; None where that is unknown."""
        return machine.oom_kills_since(self._oom_kills_before)

    def start(self, spec: JobSpec) -> Job:
        """Start a job, in the place of one of the same name."""
        if spec.name not in self.jobs:
            self.logs.follow(spec.who, spec.log)
        started = self.jobs[spec.name] = Job(spec, self._base)
        return started

    def run(self, session: Part, driver: Driver) -> int:
        """Step both until they are done and no process is left. The exit code."""
        started, tick_s = time.monotonic(), _SHORTEST_S
        job.adopt_orphans()
        try:
            self._deliver(driver.on_signal)
            while not (session.done and driver.done and not self._alive) and not self.teardown.stuck:
                self._sleep(min(tick_s, session.patience_s, driver.patience_s), session, driver)
                self._deliver(driver.on_signal)
                self._collect()
                shown = self.logs.pump()
                session.step(time.monotonic())
                driver.step(time.monotonic())
                self.teardown.advance()
                tick_s = _SHORTEST_S if shown else _BEHIND_S if self.console.behind else 2 * tick_s
            self.logs.finish()
            return driver.conclude(time.monotonic() - started)
        finally:
            left = job.clear(self.jobs.values())
            if left:
                self.console.say(f"killed, but still there: {left}; they sleep in the kernel, which alone can end them")
            self.console.flush(_SHOW_S)

    @property
    def _alive(self) -> list[Job]:
        return [running for running in self.jobs.values() if running.alive]

    def _deliver(self, on_signal: Callable[[signal.Signals], None]) -> None:
        for number in self._signals.take():
            on_signal(number)

    def _sleep(self, seconds: float, *parts: Part) -> None:
        poll = select.poll()
        for fd in (self._signals.fd, *(running.pidfd for running in self._alive)):
            poll.register(fd, select.POLLIN)
        for part in parts:
            for fd, events in part.watch():
                poll.register(fd, events)
        poll.poll(1000 * seconds)

    def _collect(self) -> None:
        """Take note of the jobs that have ended, and leave nothing of them."""
        for running in self._alive:
            ended = running.poll()
            if ended and ended.signal:
                job.sweep(self.jobs.values())
        job.reap(self.jobs.values())
