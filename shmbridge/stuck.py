"""A GPU that waits for a dead teacher waits for ever, and its host with it: in C, where no exception and no signal handler
gets through. The heartbeat's thread sees it, says why on the board, and ends the process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from shmbridge import trace
from shmbridge.peer import Identity, Peer
from shmbridge.session import TrainerSession

PATIENCE_S = 5.0
EXIT_CODE = 75


class Stuck:
    """Of one rank. `waits_for` tells whose reply its GPU still waits for, or reads."""

    def __init__(self, session: TrainerSession, waits_for: Callable[[], Identity | None]) -> None:
        self._session = session
        self._waits_for = waits_for
        self._teacher: Peer | None = None
        self._since: float | None = None

    def look(self) -> None:
        """Called once a second. Does not return where the GPU has waited PATIENCE_S for a teacher that is gone."""
        who, now = self._waits_for(), time.monotonic()
        if who is None:
            self._since = None
            return
        if self._teacher is None or self._teacher.identity != who:
            self._teacher, self._since = Peer(who), None  # not the session's: that one belongs to the main thread
        if self._teacher.alive():
            self._since = None
            return
        self._since = self._since or now
        if now - self._since >= PATIENCE_S:
            self._leave()

    def _leave(self) -> None:
        why = (
            f"this rank's GPU has waited {PATIENCE_S:.0f} s for a reply of a teacher that is gone, and no exception can end "
            "that wait: the process ends (exit code 75)."
        )
        self._session.record.fail(why, consequence=True)
        trace.logger.error("rank %d: %s", self._session.lane.index, why)
        os._exit(EXIT_CODE)
