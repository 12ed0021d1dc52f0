"""The handle on a session that a training job holds: five verbs, and what can be seen.

HostedSession is this launcher's own; RemoteSession is a kept teacher's, over its socket.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from launcher.process.job import Job
from launcher.supervisor.ranks import Ranks
from shmbridge.config import Config
from shmbridge.shm.participant_record import Failure
from shmbridge.shm.session import MappedSession, Token

if TYPE_CHECKING:
    from launcher.supervisor.cause import Cause


class SessionHandle:
    """The verbs, for a run without a teacher: nothing is served, and nothing fails."""

    view: MappedSession | None = None  # what is mapped of it
    failure: Cause | None = None  # of the session itself, which ends whoever uses it
    leaving = ""  # why the owner of a kept session ends it
    done = True  # it is closed

    def __init__(self, ranks: int = 0) -> None:
        self.ranks = Ranks([], ranks)

    @property
    def jobs(self) -> Sequence[Job]:
        """Of the teachers that are this launcher's own."""
        return ()

    @property
    def lost(self) -> bool:
        """No teacher is there any more, and none will come."""
        return False

    @property
    def ended(self) -> bool:
        """No teacher will answer anything more of this generation."""
        return True

    @property
    def patience_s(self) -> float:
        return float("inf")

    @property
    def no_witnesses(self) -> Collection[int]:
        """Replicas whose end is no cause of the run's."""
        return ()

    def begin(self, settings: Config, ranks: int) -> Token | None:
        """A generation for so many ranks, which read `settings`. None without a teacher, and while the teachers still finish the generation
        before: to be called again. Raises ShmbridgeError."""
        self.ranks = Ranks([], ranks)
        return None

    def end(self) -> None:
        """The training group has ended: the teachers drain."""

    def save(self) -> None:
        """The run is to stop: ranks with a save hook save at their next call of the bridge."""

    def fail(self, failure: Failure) -> None:
        """Every wait of this generation's ranks ends with the failure."""

    def close(self, trained: bool = False, failed: int | None = None) -> None:
        """No generation follows. Teachers that load are killed, but for the replica that has `failed` and may be writing its
        traceback, or where training has ended well: they may show yet that they cannot load."""

    def watch(self) -> Iterable[tuple[int, int]]:
        return self.ranks.watch()

    def step(self, now: float) -> None:
        self.ranks.update()
