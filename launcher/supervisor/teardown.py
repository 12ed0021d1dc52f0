"""How jobs are ended: a time to stop by themselves, a signal to the ranks, one shared grace, SIGKILL.

Teachers are sent no signal: they end when the session says so, or with SIGKILL.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping

from launcher.console.terminal import Console
from launcher.console.text import listed, seconds
from launcher.plan.jobs import TRAIN
from launcher.process.job import Job

_NEVER = float("inf")
_UNKILLABLE_S = 5.0  # a process in uninterruptible sleep takes no SIGKILL until the kernel lets go of it


class Teardown:
    """Ends `jobs` by name, step by step; `advance` takes the steps that are due."""

    def __init__(self, jobs: Mapping[str, Job], grace_s: float, console: Console) -> None:
        self._jobs = jobs
        self._grace_s = grace_s
        self._console = console
        self._number = signal.SIGTERM
        self._stop_at = self._kill_at = self._give_up_at = _NEVER  # monotonic seconds

    def begin(self, after_s: float = 0.0, number: signal.Signals = signal.SIGTERM) -> None:
        """In `after_s` the ranks that still run are sent `number`, SIGINT or SIGTERM; one grace later whatever still runs is
        killed."""
        self._number = number
        self._stop_at = time.monotonic() + after_s
        self._kill_at = self._stop_at + self._grace_s

    def kill(self) -> None:
        """SIGKILL for all of every job."""
        left = [job for job in self._jobs.values() if job.alive]
        self._console.say(f"SIGKILL for {listed([f'{job.name} (pid {job.first_pid})' for job in left])}")
        for job in left:
            job.kill()
        self._stop_at = self._kill_at = _NEVER
        self._give_up_at = time.monotonic() + _UNKILLABLE_S

    def advance(self) -> None:
        now = time.monotonic()
        if now >= self._stop_at:
            self._stop_at = _NEVER
            if TRAIN in self._jobs:
                self._jobs[TRAIN].stop(self._number)
        if now >= self._kill_at:
            self._console.say(f"the grace of {seconds(self._grace_s)} (timeouts.shutdown_s) is over")
            self.kill()

    @property
    def stuck(self) -> bool:
        """A killed process does not end, and no one can make it."""
        return time.monotonic() >= self._give_up_at
