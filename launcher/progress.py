"""What the teacher is doing until it is ready, as lines on the terminal."""

from __future__ import annotations

import time

from launcher.console import Console
from launcher.text import seconds
from shmbridge.board import Phase, Record

_EVERY_S = 2.0
_BEFORE_READY = {
    Phase.STARTING: "starts",
    Phase.LOADING: "loads the model",
    Phase.PROBING: "tries a first forward",
}


class Progress:
    """A line when something changed, and at most every 2 s within one phase."""

    def __init__(self, console: Console, record: Record, generation: int) -> None:
        self._console = console
        self._record = record
        self._generation = generation
        self._started = time.monotonic()
        self._shown: tuple[Phase, tuple[int, int]] | None = None
        self._shown_at = 0.0
        self.ready = False

    def show(self) -> None:
        """Print a line where there is something to tell."""
        if self.ready or self._record.identity is None:
            return
        if self._record.ready == self._generation:
            self.ready = True
            self._console.say(f"teacher ready in {seconds(time.monotonic() - self._started)}")
            return
        phase, now = self._record.phase, time.monotonic()
        state = (phase, self._record.progressed)
        same_phase = self._shown is not None and self._shown[0] is phase
        if phase not in _BEFORE_READY or state == self._shown or (same_phase and now - self._shown_at < _EVERY_S):
            return
        self._shown, self._shown_at = state, now
        self._console.say(f"teacher {_BEFORE_READY[phase]}{_share(state)}, {seconds(now - self._started)}")


def _share(state: tuple[Phase, tuple[int, int]]) -> str:
    phase, (done, total) = state
    return f": {done} of {total} ({100 * done // total} %)" if phase is Phase.LOADING and total else ""
