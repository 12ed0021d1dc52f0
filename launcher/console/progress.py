"""What the teachers are doing until they are ready, as lines on the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launcher.console.terminal import Console
from launcher.console.text import listed, seconds
from shmbridge.shm.participant_record import Phase, Record

_EVERY_S = 2.0
# What one teacher does, and what several do; with several, the first to load waits for the last.
_BEFORE_READY = {
    Phase.STARTING: ("starts", "start"),
    Phase.LOADING: ("loads the model", "load the model"),
    Phase.PROBING: ("tries a first forward", "try a first forward"),
}
_WAITING = {Phase.OFFERED: ("waits for the others", "wait for the others")}


class Progress:
    """A line when something changed, at most every 2 s; of one teacher also whenever it enters a phase."""

    def __init__(self, console: Console, records: Sequence[Record]) -> None:
        self._console = console
        self._waiting = dict(enumerate(records))  # which are not ready
        self._alone = len(records) == 1
        self._started = time.monotonic()
        self._parts = dict.fromkeys(self._waiting, (1, 0, 0))  # by replica: the part of its loading, done, total
        self._shown: dict[int, tuple[Phase, str]] = {}  # by replica: its phase, and how far it has loaded
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
        waiting = {i: record for i, record in self._waiting.items() if record.identity}
        states = {i: (record.phase, self._loaded(i, *record.progressed)) for i, record in waiting.items()}
        if states == self._shown or not any(phase in _BEFORE_READY for phase, _ in states.values()):
            return
        entered = self._alone and [phase for phase, _ in states.values()] != [
            phase for phase, _ in self._shown.values()
        ]
        if entered or not self._shown or now - self._shown_at >= _EVERY_S:
            self._shown, self._shown_at = states, now
            self._console.say(f"{self._told(states)}, {seconds(now - self._started)}")

    def _told(self, states: dict[int, tuple[Phase, str]]) -> str:
        """What all teachers do; teachers in the same phase share a clause."""
        parts = []
        for phase, verbs in (_BEFORE_READY | _WAITING).items():
            replicas = [i for i, state in states.items() if state[0] is phase]
            if replicas:
                loaded = [states[i][1] or "0 %" for i in replicas if phase is Phase.LOADING]
                share = f": {listed(loaded)}" if any(states[i][1] for i in replicas) and loaded else ""
                parts.append(f"{self._called(replicas)} {verbs[len(replicas) > 1]}{share}")
        return "; ".join(parts)

    def _loaded(self, replica: int, done: int, total: int) -> str:
        """`25 %`, or `25 % of part 2`: files and weights are counted one after the other, each from 0. Empty where it is unknown."""
        if not total:
            return ""
        part, before, whole = self._parts[replica]
        if whole and (total != whole or done < before):
            part += 1
        self._parts[replica] = part, done, total
        return f"{100 * done // total} %" + (f" of part {part}" if part > 1 else "")

    def _called(self, replicas: Sequence[int]) -> str:
        if self._alone:
            return "teacher"
        return f"teacher{'s' if len(replicas) > 1 else ''} {listed([str(i) for i in replicas])}"
