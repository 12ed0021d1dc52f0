"""What the teachers are doing until they are ready, as lines on the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launcher.console.terminal import Console
from launcher.console.text import listed, seconds
from shmbridge.shm.record import Phase, Record

_EVERY_S = 2.0
# What one teacher does, and what several do; with several, the first to load waits for the last.
_BEFORE_READY = {
    Phase.STARTING: ("starts", "start"),
    Phase.LOADING: ("loads the model", "load the model"),
    Phase.PROBING: ("tries a first forward", "try a first forward"),
}
_WAITING = {Phase.OFFERED: ("waits for the others", "wait for the others")}

States = dict[int, tuple[Phase, tuple[int, int]]]  # by replica: its phase, and what is done of how much


class Progress:
    """A line when something changed, at most every 2 s; of one teacher also whenever it enters a phase."""

    def __init__(self, console: Console, records: Sequence[Record]) -> None:
        self._console = console
        self._waiting = dict(enumerate(records))  # which are not ready
        self._alone = len(records) == 1
        self._started = time.monotonic()
        self._shown: States = {}
        self._shown_at = 0.0

    @property
    def ready(self) -> bool:
        return not self._waiting

    def show(self) -> None:
        """Print a line where there is something to tell."""
        now = time.monotonic()
        # It has opened the barrier of a generation, or has loaded and none is open.
        ready = [i for i, record in self._waiting.items() if record.phase is Phase.IDLE or record.ready > 0]
        for replica in ready:
            del self._waiting[replica]
        if ready:
            self._console.say(f"{self._called(ready)} ready in {seconds(now - self._started)}")
        states = {i: (record.phase, record.progressed) for i, record in self._waiting.items() if record.identity}
        if self._is_due(states, now):
            self._shown, self._shown_at = states, now
            self._console.say(f"{self._told(states)}, {seconds(now - self._started)}")

    def _is_due(self, states: States, now: float) -> bool:
        if states == self._shown or not any(phase in _BEFORE_READY for phase, _ in states.values()):
            return False
        entered = self._alone and [state[0] for state in states.values()] != [
            shown[0] for shown in self._shown.values()
        ]
        return not self._shown or entered or now - self._shown_at >= _EVERY_S

    def _told(self, states: States) -> str:
        """What all teachers do; teachers in the same phase share a clause."""
        parts = []
        for phase, verbs in (_BEFORE_READY | _WAITING).items():
            replicas = [i for i, state in states.items() if state[0] is phase]
            if replicas:
                share = _share([states[i][1] for i in replicas]) if phase is Phase.LOADING else ""
                parts.append(f"{self._called(replicas)} {verbs[len(replicas) > 1]}{share}")
        return "; ".join(parts)

    def _called(self, replicas: Sequence[int]) -> str:
        if self._alone:
            return "teacher"
        return f"teacher{'s' if len(replicas) > 1 else ''} {listed([str(i) for i in replicas])}"


def _share(progress: Sequence[tuple[int, int]]) -> str:
    """How far each is; empty where none can tell."""
    percent = [100 * done // total if total else 0 for done, total in progress]
    if not any(total for _, total in progress):
        return ""
    if len(progress) > 1:
        return f": {listed([str(share) for share in percent])} %"
    ((done, total),) = progress
    return f": {done} of {total} ({percent[0]} %)"
