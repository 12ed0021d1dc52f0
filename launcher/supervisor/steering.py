"""What the supervisor of a training group needs of the session and of the teachers, whoever owns them.

In a run of its own that is an Owner and its Teachers; beside a kept teacher an Attachment and its KeptTeachers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from shmbridge.config import Config
from shmbridge.shm.session import Control, Lane, Token
from shmbridge.shm.status import Failure

if TYPE_CHECKING:
    from launcher.process.job import Job
    from launcher.supervisor.cause import Cause
    from launcher.supervisor.ranks import Ranks


class Board(Protocol):
    """A session as it is read."""

    @property
    def control(self) -> Control: ...
    @property
    def lanes(self) -> list[Lane]: ...
    def failures(self) -> list[Failure]:
        """Causes before consequences, the earliest first."""


class Steering(Board, Protocol):
    """A session as its launcher steers it."""

    @property
    def session_id(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def settings(self) -> Config: ...
    def describe(self, settings: Config) -> None:
        """What the participants of the next generation read."""

    def start_generation(self) -> Token:
        """Raises ShmbridgeError."""

    def end_training(self) -> None:
        """The training group has ended; the teachers drain."""

    def end_session(self) -> None:
        """The same, and no generation follows."""

    def ask_to_stop(self) -> None:
        """The user, or the scheduler, stops the run: ranks with a save hook save at their next call of the bridge."""

    def fail(self, failure: Failure) -> None:
        """Every wait of this run's processes stops with it."""


class Serving(Protocol):
    """The teachers of a run."""

    @property
    def jobs(self) -> Sequence[Job]:
        """Those that are this launcher's own."""

    @property
    def no_witnesses(self) -> Collection[int]:
        """Replicas whose end is no cause of the run's."""

    @property
    def ready(self) -> bool:
        """Every one has opened the startup barrier."""

    @property
    def drained(self) -> bool:
        """Another generation may begin."""

    @property
    def lost(self) -> bool:
        """None is there any more, and none will come."""

    @property
    def ended(self) -> bool:
        """None will answer anything more of this generation."""

    @property
    def asks_to_stop(self) -> str:
        """Why the run is to stop, as its teachers' keeper tells it; empty where it is not."""

    def watch(self) -> list[int]:
        """File descriptors that become readable when there is something to look at."""

    def serve(self, ranks: Ranks) -> None:
        """Training starts again; these are its ranks."""

    def agree(self) -> str:
        """Create the reply memory once it is known; its size, when that is done now. Raises PlanError."""

    def revive(self) -> None:
        """Start new teachers in the place of dead ones. Raises PlanError."""

    def survives(self, found: Cause) -> bool:
        """Whether the run goes on although a teacher has died."""

    def end(self, failed: int | None = None) -> None:
        """Nobody is left to serve. Teachers that serve end by themselves, and those that load are killed, but for the replica
        that has `failed` and may be writing its traceback. Kept ones stay."""

    def show_progress(self) -> None: ...
    def ended_early(self) -> Job | None:
        """One that has ended with ranks of its own still to be served."""

    def crashed_late(self, trained: bool) -> Sequence[Job]:
        """Those that crashed when their ranks had finished with them; each is told once."""
