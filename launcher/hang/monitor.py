"""Times what the rules find while training runs: what has stood for too long is reported, and the wait goes on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from launcher.console.terminal import Console
from launcher.console.text import seconds
from launcher.hang import report, rules, snapshot
from launcher.hang.rules import Finding
from launcher.hang.snapshot import Participant
from shmbridge.config import Config
from shmbridge.shm.session import MappedSession

_EVERY_S = 1.0
_LONGEST_TICK_S = 5.0  # a longer one: the launcher was stopped, or the machine slept


class Overdue(msgspec.Struct, frozen=True):
    """Who was not ready, or has not attached, within timeouts.startup_s."""

    who: Participant
    reason: str


class _Standing(msgspec.Struct):
    """A finding over time."""

    finding: Finding
    due_s: float
    stood_s: float


class Monitor:
    """Looks at a session once a second, over all its generations."""

    def __init__(self, view: MappedSession, config: Config, run: Path, console: Console) -> None:
        """`config` has the timeouts and the session's name; reports are kept in `run`."""
        self._view = view
        self._config = config
        self._run = run.resolve()
        self._console = console
        self._standing: dict[tuple[str | int, ...], _Standing] = {}
        self._last: float | None = None  # monotonic seconds

    def step(self, now: float) -> Overdue | None:
        """Print and keep a report of what is due, which takes a few seconds at most. Returns who ends the run.

        Args:
            now: monotonic seconds; within a second of the last look nothing is done.
        """
        if self._last is not None and now - self._last < _EVERY_S:
            return None
        if due := self.due(now):
            longest, stood_s = due[0]
            why = f"waiting for {', '.join(longest.suspects)} for {seconds(stood_s)}"
            made = report.make(self._view, self._run, why, self._config.name)
            try:
                made = report.write(made, self._run)
            except OSError as error:
                self._console.say(f"the hang report could not be kept in {self._run}: {error.strerror}")
            self._console.write(f"\n{made}\n\n")
            self._console.flush()
        return self.overdue()

    def due(self, now: float) -> list[tuple[Finding, float]]:
        """Look, and count. The findings to report now, with the seconds that they have stood, the longest first.

        Time counts only while this process runs and nobody is excused. What has stood for half as long as the longest
        belongs to the same standstill: it is reported with it, and again once the time has doubled.
        """
        step_s = 0.0 if self._last is None else min(max(0.0, now - self._last), _LONGEST_TICK_S)
        self._last, before, self._standing = now, self._standing, {}
        for finding in rules.find(snapshot.look(self._view, search=False)):
            if finding.report_after:
                due_s, stood_s = getattr(self._config.timeouts, finding.report_after), 0.0
                if finding.key in before:
                    due_s, stood_s = before[finding.key].due_s, before[finding.key].stood_s
                    stood_s += 0.0 if finding.excused else step_s
                self._standing[finding.key] = _Standing(finding, due_s, stood_s)
        standing = sorted(self._standing.values(), key=lambda entry: -entry.stood_s)
        longest_s = max((entry.stood_s for entry in standing if entry.stood_s >= entry.due_s), default=float("inf"))
        due = [entry for entry in standing if entry.stood_s >= longest_s / 2]
        for entry in due:
            entry.due_s = max(entry.due_s, entry.stood_s + longest_s)
        return [(entry.finding, entry.stood_s) for entry in due]

    def overdue(self) -> Overdue | None:
        """Who ends the run; to be asked after `due`. It is a kept teacher that was not ready within
        timeouts.startup_s, or a rank that has not attached within it although the teachers are ready and the other
        ranks stand still."""
        startup_s = self._config.timeouts.startup_s
        entries = self._standing.values()
        late = {entry.finding.suspects for entry in entries if entry.finding.fatal and entry.stood_s >= startup_s}
        if not late:
            return None
        seen = report.make(self._view, self._run, "", self._config.name).snapshot
        fatal = [finding for finding in rules.find(seen) if finding.fatal and finding.suspects in late]
        if not fatal:  # it has come in the meantime
            return None
        who, *others = [finding.suspects[0] for finding in fatal]
        more = f", also exceeded by {', '.join(others)}" if others else ""
        reason = f"{fatal[0].sentence.removeprefix(f'{who} ')} (timeouts.startup_s is {seconds(startup_s)}{more})"
        return Overdue(next(participant for participant in seen.participants if participant.who == who), reason)
