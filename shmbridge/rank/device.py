"""The device on which a rank reads its replies, and how the death of a teacher is noticed there.

A GPU that waits for a dead teacher waits for ever, and the host thread that waits for this GPU is stuck in C, where neither an
exception nor a signal handler reaches it. The heartbeat's thread sees that, writes the reason to its record and ends the
process. In the other case every call of CUDA raises an error, and the rank's own thread tells it from an error of the training loop.
"""

from __future__ import annotations

import os
import time

import torch

from shmbridge import log
from shmbridge.errors import TeacherDied
from shmbridge.plane import cuda_runtime
from shmbridge.shm.process import Identity, Peer
from shmbridge.shm.rank_session import RankSession

PATIENCE_S = 5.0
EXIT_CODE = 75
DEATH_S = 2.0  # the memory of a process that is killed is freed before the process is seen to end


def choose(session: RankSession, given: torch.device | None) -> torch.device:
    """The given device; None: the current CUDA device where the launcher gave training GPUs, else the CPU.

    Logs a warning where the current device is not the rank's own, unless the rank has opened its replies before.
    """
    gpus = session.settings.train.gpus
    if given is None and not (gpus and torch.cuda.is_available()):
        return torch.device("cpu")
    if given is not None and (given.type != "cuda" or given.index is not None):
        return given
    current = torch.cuda.current_device()
    if given is None and session.plane is None:
        different: set[int] = set()  # of a list such as `0-6` or `0,2,2`: the launcher gives each rank one, in turn
        for part in gpus.split(","):
            first, _, last = part.partition("-")
            different.update(range(int(first), int(last or first) + 1))
        lane = session.lane.index
        own = lane % len(different)
        if current != own and own < torch.cuda.device_count():  # else the script itself hides the others from each rank
            log.logger.warning(
                "rank %d reads its replies on cuda:%d, the current device, and its own GPU is cuda:%d: replies, and a CUDA context, "
                "go to a GPU that belongs to another process. Call torch.cuda.set_device(%d) before the first use of the bridge "
                "(LOCAL_RANK tells the number), or give connect(device=...).",
                *(lane, current, own, own),
            )
    return torch.device("cuda", current)


class Watchdog:
    """Watches the GPU of one rank for a teacher that has died. Without a session, and on the CPU, it sees nothing."""

    def __init__(self, session: RankSession | None) -> None:
        self._session = session
        self.broken_at: tuple[Identity, int] | None = None
        """The teacher and the reply that have made CUDA unusable in this process."""
        self._read: tuple[Identity, int] | None = None
        self._teacher: Peer | None = None
        self._since = 0.0  # the GPU stands at the read, and its teacher is gone

    def blame(self, error: BaseException, number: int | None = None) -> TeacherDied | None:
        """What to raise in place of an error of CUDA after which no call of CUDA succeeds, and which the death of a teacher
        explains: this rank's GPU was reading its memory, and it is gone, or is within DEATH_S. None: another error, or all of
        these teachers live.

        Args:
            number: the reply, or chunk, that was read. None: the oldest whose slot is not released.
        """
        session = self._session
        if session is None or session.plane is None or not cuda_runtime.is_sticky(error):
            return None
        peers = [Peer(who) for who in session.plane.teachers()]
        if not peers:
            return None

        def dead() -> Identity | None:
            return next((peer.identity for peer in peers if not peer.alive()), None)

        gone = session.bell.wait(dead, lambda: None, time.monotonic() + DEATH_S)
        if gone is None:
            return None
        last = session.ring.released if number is None else number
        self.broken_at = gone, last
        said = (str(error).splitlines() or [""])[0]
        return TeacherDied(
            f"rank {session.lane.index}, reply {last}: the GPU reports {said!r}, and the teacher (pid {gone.pid}) whose "
            "memory it was reading is gone. CUDA can no longer be used in this process, which ends: start again from the last "
            "checkpoint."
        )

    def look(self) -> None:
        """Called once a second, in the heartbeat's thread. Does not return where the GPU has stood for PATIENCE_S at one read of
        a teacher that is gone."""
        session = self._session
        if session is None or session.plane is None:
            return
        read, now = self.broken_at or session.plane.stands_at(), time.monotonic()
        if read is None:
            self._read = None
            return
        if self._teacher is None or self._teacher.identity != read[0]:
            self._teacher = Peer(read[0])  # not the session's: that one belongs to the main thread
        if read != self._read or self._teacher.alive():
            self._read, self._since = read, now
        if not self._teacher.alive() and now - self._since >= PATIENCE_S:
            why = (
                f"this rank's GPU has waited {PATIENCE_S:.0f} s for a reply of a teacher that is gone, and no exception can end "
                "that wait: the process ends (exit code 75)."
            )
            session.record.fail(why, consequence=True)
            log.logger.error("rank %d: %s", session.lane.index, why)
            os._exit(EXIT_CODE)
