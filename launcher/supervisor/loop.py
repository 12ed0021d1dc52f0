"""The one loop of a launcher: it sleeps until a process, a socket or a signal has something to tell, then steps a session and what
drives it.

It also ends the jobs: they have a time to stop by themselves, then the ranks are sent a signal, and after one grace all that is left is
killed. Teachers are sent no signal: they end when the session says so, or with SIGKILL.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from launcher.console.logs import Logs
from launcher.console.terminal import Console
from launcher.console.text import listed, seconds
from launcher.planning import machine
from launcher.planning.jobs import TRAIN, JobSpec
from launcher.process import job, shim
from launcher.process.job import Job
from launcher.process.signals import Signals
from launcher.supervisor.session_handle import SessionHandle

_SHORTEST_S, _BEHIND_S = 0.05, 0.1  # after log lines were shown; while the terminal takes none
_SHOW_S = 5.0
_UNKILLABLE_S = 5.0  # a process in uninterruptible sleep takes no SIGKILL until the kernel lets go of it
_NEVER = float("inf")


class Driver(Protocol):
    """What the loop steps beside the session: the part that decides how the launcher ends."""

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
        self._base = base
        self._signals = signals
        self._oom_kills_before = machine.oom_kills()
        self._grace_s = grace_s
        self._number = signal.SIGTERM
        self._stop_at = self._kill_at = self._give_up_at = _NEVER  # monotonic seconds

    def oom_kills(self) -> int | None:
        """How many processes the kernel has killed for want of memory since the start; None where that is unknown."""
        return machine.oom_kills_since(self._oom_kills_before)

    def start(self, spec: JobSpec) -> Job:
        """Start a job, in the place of one of the same name."""
        if spec.name not in self.jobs:
            self.logs.follow(spec.who, spec.log)
        started = self.jobs[spec.name] = Job(spec, self._base)
        return started

    def stop(self, after_s: float = 0.0, number: signal.Signals = signal.SIGTERM) -> None:
        """In `after_s` send the ranks that still run SIGINT or SIGTERM; one grace later kill whatever still runs."""
        self._number = number
        self._stop_at = time.monotonic() + after_s
        self._kill_at = self._stop_at + self._grace_s

    def kill(self) -> None:
        """SIGKILL for all of every job."""
        left = self._alive
        self.console.say(f"SIGKILL for {listed([f'{running.name} (pid {running.first_pid})' for running in left])}")
        for running in left:
            running.kill()
        self._stop_at = self._kill_at = _NEVER
        self._give_up_at = time.monotonic() + _UNKILLABLE_S

    def run(self, session: SessionHandle, driver: Driver) -> int:
        """Step both until they are done and no process is left. The exit code."""
        started, tick_s = time.monotonic(), _SHORTEST_S
        shim.become_subreaper()
        try:
            while True:
                for number in self._signals.take():
                    driver.on_signal(number)
                self._collect()
                shown = self.logs.pump()
                session.step(time.monotonic())
                driver.step(time.monotonic())
                self._stop_what_is_due(time.monotonic())
                if (session.done and driver.done and not self._alive) or time.monotonic() >= self._give_up_at:
                    break
                tick_s = _SHORTEST_S if shown else _BEHIND_S if self.console.behind else 2 * tick_s
                fds = [*session.watch(), *driver.watch(), (self._signals.fd, select.POLLIN)]
                fds += [(running.pidfd, select.POLLIN) for running in self._alive]
                poll = select.poll()
                for fd, events in fds:
                    poll.register(fd, events)
                poll.poll(1000 * min(tick_s, session.patience_s, driver.patience_s))
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

    def _collect(self) -> None:
        """Take note of the jobs that have ended, and leave nothing of them."""
        for running in self._alive:
            ended = running.poll()
            if ended and ended.signal:
                job.sweep(self.jobs.values())
        job.reap(self.jobs.values())

    def _stop_what_is_due(self, now: float) -> None:
        if now >= self._stop_at:
            self._stop_at = _NEVER
            if TRAIN in self.jobs:
                self.jobs[TRAIN].stop(self._number)
        if now >= self._kill_at:
            self.console.say(f"the grace of {seconds(self._grace_s)} (timeouts.shutdown_s) is over")
            self.kill()
