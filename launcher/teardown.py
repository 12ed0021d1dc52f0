"""How jobs are ended: a time to stop by themselves, SIGTERM, one shared grace, SIGKILL."""

from __future__ import annotations

import time
from collections.abc import Mapping

from launcher.console import Console
from launcher.job import Job
from launcher.text import listed, seconds

_NEVER = float("inf")
_UNKILLABLE_S = 5.0  # a process in uninterruptible sleep takes no SIGKILL until the kernel lets go of it


class Teardown:
    """Ends `jobs` by name, step by step; `advance` takes the steps that are due."""

    def __init__(self, jobs: Mapping[str, Job], grace_s: float, console: Console) -> None:
        self._jobs = jobs
        self._grace_s = grace_s
        self._console = console
        self._terminate_at: dict[str, float] = {}  # monotonic seconds
        self._kill_at = _NEVER
        self._give_up_at = _NEVER

    def begin(self, after_s: float) -> None:
        """SIGTERM for what still runs in `after_s`, and SIGKILL one grace later."""
        at = time.monotonic() + after_s
        self._terminate_at = dict.fromkeys(self._jobs, at)
        self._kill_at = at + self._grace_s

    def terminate(self, name: str) -> None:
        """SIGTERM for one job now, where there is such a job."""
        self._terminate_at.pop(name, None)
        if name in self._jobs:
            self._jobs[name].terminate()

    def kill(self) -> None:
        """SIGKILL for all of every job."""
        left = [job for job in self._jobs.values() if job.alive]
        self._console.say(f"SIGKILL for {listed([f'{job.name} (pid {job.first_pid})' for job in left])}")
        for job in left:
            job.kill()
        self._terminate_at = {}
        self._kill_at = _NEVER
        self._give_up_at = time.monotonic() + _UNKILLABLE_S

    def advance(self) -> None:
        now = time.monotonic()
        for name in [name for name, at in self._terminate_at.items() if now >= at]:
            self.terminate(name)
        if now >= self._kill_at:
            self._console.say(f"the grace of {seconds(self._grace_s)} (timeouts.shutdown_s) is over")
            self.kill()

    @property
    def stuck(self) -> bool:
        """A killed process does not end, and no one can make it."""
        return time.monotonic() >= self._give_up_at
