"""What a teacher's death does to a rank's GPU.

A GPU that waits for a dead teacher waits for ever, and its host with it: in C, where no exception and no signal handler gets
through. The heartbeat's thread sees it, says why on the board, and ends the process. Or every call of CUDA raises an error, which
the rank's own thread tells from one of the training loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from shmbridge import log
from shmbridge.plane import cuda_runtime
from shmbridge.shm.process import Identity, Peer
from shmbridge.shm.session import TrainerSession

PATIENCE_S = 5.0
EXIT_CODE = 75
DEATH_S = 2.0  # the memory of a process that is killed goes before the process is seen to end


def dead_teacher(session: TrainerSession, error: BaseException, teachers: Iterable[Identity]) -> Identity | None:
    """The one of `teachers`, whose memory this rank's GPU reads, that explains an error of CUDA after which no call of CUDA
    succeeds: it is gone, or within DEATH_S. None: another error, or all of them live."""
    if not cuda_runtime.is_sticky(error):
        return None
    peers = [Peer(who) for who in teachers]
    if not peers:
        return None

    def dead() -> Identity | None:
        return next((peer.identity for peer in peers if not peer.alive()), None)

    return session.bell.wait(dead, lambda: None, time.monotonic() + DEATH_S)


class Stuck:
    """Watches one rank. `stands_at` gives the read that its GPU has come to and not got past, see planes.RankPlane."""

    def __init__(self, session: TrainerSession, stands_at: Callable[[], tuple[Identity, int] | None]) -> None:
        self._session = session
        self._stands_at = stands_at
        self._read: tuple[Identity, int] | None = None
        self._teacher: Peer | None = None
        self._since = 0.0  # the GPU stands at the read, and its teacher is gone

    def look(self) -> None:
        """Called once a second. Does not return where the GPU has stood for PATIENCE_S at one read of a teacher that is gone."""
        read, now = self._stands_at(), time.monotonic()
        if read is None:
            self._read = None
            return
        if self._teacher is None or self._teacher.identity != read[0]:
            self._teacher = Peer(read[0])  # not the session's: that one belongs to the main thread
        if read != self._read or self._teacher.alive():
            self._read, self._since = read, now
        if not self._teacher.alive() and now - self._since >= PATIENCE_S:
            self._leave()

    def _leave(self) -> None:
        why = (
            f"this rank's GPU has waited {PATIENCE_S:.0f} s for a reply of a teacher that is gone, and no exception can end "
            "that wait: the process ends (exit code 75)."
        )
        self._session.record.fail(why, consequence=True)
        log.logger.error("rank %d: %s", self._session.lane.index, why)
        os._exit(EXIT_CODE)
