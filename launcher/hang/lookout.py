"""The hang report of a running session, when it is due: printed, kept in the run directory, and the wait goes on."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.console.terminal import Console
from launcher.hang import monitor, report
from launcher.hang.monitor import Debt, Watch
from launcher.hang.snapshot import View
from launcher.supervisor.cause import Cause
from shmbridge.config import Config

_EVERY_S = 1.0


class Lookout:
    """Of one run."""

    def __init__(self, view: View, config: Config, run: Path, console: Console) -> None:
        self._view = view
        self._name = config.name
        self._run = run.resolve()
        self._console = console
        self._watch = Watch(view, config)
        self._looked = 0.0  # monotonic seconds

    def look(self) -> Cause | None:
        """Once a second: report what is due, which takes a few seconds at most; the failure of ranks that never attached."""
        now = time.monotonic()
        if now - self._looked < _EVERY_S:
            return None
        self._looked = now
        debts = self._watch.due(now)
        if debts:
            self._report(debts)
        return self._watch.hard(now)

    def _report(self, debts: list[Debt]) -> None:
        made = report.make(self._view, self._run, monitor.told(debts), self._name)
        try:
            made = report.write(made, self._run)
        except OSError as error:
            self._console.say(f"the hang report could not be kept in {self._run}: {error.strerror}")
        self._console.write(f"\n{made}\n\n")
        self._console.flush()
