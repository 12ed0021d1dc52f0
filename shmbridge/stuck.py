"""A GPU that waits for a dead teacher waits for ever, and its host with it: in C, where no exception and no signal handler
gets through. The heartbeat's thread sees it, says why on the board, and ends the process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from shmbridge import trace
from shmbridge.peer import Peer
from shmbridge.session import TrainerSession

PATIENCE_S = 5.0
EXIT_CODE = 75


class Stuck:
    """Of one rank. `busy` tells whether its GPU still waits for a reply, or reads one."""

    def __init__(self, session: TrainerSession, busy: Callable[[], bool]) -> None:
        self._session = session
        self._busy = busy
        self._teacher: Peer | None = None
        self._since: float | None = None

    def look(self) -> None:
        """Called once a second. Does not return where the GPU has waited PATIENCE_S for a teacher that is gone."""
        if not (self._busy() and self._teacher_gone()):
            self._since = None
            return
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since >= PATIENCE_S:
            self._leave()

    def _teacher_gone(self) -> bool:
        """A watch of its own: the other one belongs to the main thread."""
        who = self._session.teacher.identity
        if who is not None and (self._teacher is None or not self._since):
            self._teacher = Peer(who)
        return self._teacher is not None and not self._teacher.alive()

    def _leave(self) -> None:
        why = (
            f"this rank's GPU has waited {PATIENCE_S:.0f} s for a reply of a teacher that is gone, and no exception can end "
            "that wait: the process ends (exit code 75)."
        )
        self._session.record.fail(why, consequence=True)
        trace.logger.error("rank %d: %s", self._session.lane.index, why)
        os._exit(EXIT_CODE)
