"""The teachers of a run: until all are ready, while each serves its ranks, and how each may end."""

from __future__ import annotations

from collections.abc import MutableMapping

from launcher.console.progress import Progress
from launcher.console.terminal import Console
from launcher.plan import machine, memory, replicas
from launcher.process.job import Job
from launcher.supervisor.cause import Cause
from launcher.supervisor.ranks import Ranks
from launcher.supervisor.revival import Revival, Start
from shmbridge.config import Config
from shmbridge.errors import PlanError
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.owner import Owner
from shmbridge.shm.session import Lane
from shmbridge.shm.status import Phase

_LOADING = (Phase.ABSENT, Phase.STARTING, Phase.LOADING, Phase.PROBING)  # and does not look at the board


class Teachers:
    """One job for each replica. Replica i has lanes of its own, and is needed until their ranks have finished."""

    def __init__(
        self, config: Config, owner: Owner, jobs: MutableMapping[str, Job], ranks: Ranks, console: Console, start: Start
    ) -> None:
        """`jobs` are all of the run; `start` starts another one."""
        self.revival = Revival(config, owner, start, console)
        self._all_jobs = jobs
        self.served: set[int] = set()  # replicas that their ranks have finished with, without a failure
        self._config = config
        self._owner = owner
        self._ranks = ranks
        self._progress = Progress(console, owner.control.teachers, owner.generation)
        self._told: set[int] = set()  # of replicas that crashed late

    @property
    def jobs(self) -> list[Job]:
        """Of the replicas, in their order."""
        return [job for job in self._all_jobs.values() if job.spec.replica is not None]

    @property
    def no_witnesses(self) -> set[int]:
        """Replicas whose end is no cause of the run's."""
        return self.served | self.revival.excused

    @property
    def drained(self) -> bool:
        """The next generation may begin at any time: a teacher goes on to it once it has drained."""
        return True

    @property
    def asks_to_stop(self) -> str:
        return ""  # that is the launcher's own matter

    def watch(self) -> list[int]:
        return []  # their jobs are watched

    def survives(self, found: Cause) -> bool:
        """Whether the run goes on although the teacher that was `found` has died."""
        return self.revival.survives(found, self.jobs[found.rank])

    def end(self, failed: int | None = None) -> None:
        """Nobody is left to serve: those that serve end by themselves, those that load are killed."""
        self._owner.end_session()
        for job in self.jobs:
            replica = _replica(job)
            if self._owner.control.teachers[replica].phase in _LOADING and replica != failed:
                job.kill()

    def serve(self, ranks: Ranks) -> None:
        """Training starts again; these are its ranks."""
        self._ranks = ranks
        self.served.clear()

    def revive(self) -> None:
        """Start new teachers in the place of dead ones. Raises PlanError where one offers something else."""
        differing = self.revival.differing()
        if differing:
            raise PlanError(differing)
        self.revival.note_ready(self._owner.offered() if self.ready else None)
        self.revival.advance(self._all_jobs)

    @property
    def ready(self) -> bool:
        """Every one has opened the startup barrier."""
        return self._progress.ready

    @property
    def lost(self) -> bool:
        """None is there any more, and none will come."""
        return self.revival.lost.issuperset(map(_replica, self.jobs))

    @property
    def ended(self) -> bool:
        """None runs any more."""
        return not any(job.alive for job in self.jobs)

    def show_progress(self) -> None:
        self._progress.show()

    def agree(self) -> str:
        """Create the reply memory once all have said what they return; its size, and where it is, when that is done now.

        Raises:
            PlanError: it does not fit, or the offers differ.
        """
        if self._owner.control.words[ControlWord.REPLIES_READY] == self._owner.generation:
            return ""
        agreed = self._owner.offered()
        if agreed is None:
            return ""
        memory.check_replies(self._config, self._ranks.count, agreed, machine.look(with_gpus=False))
        return memory.created(self._config, self._owner.shape, agreed, self._owner.create_replies(agreed))

    def ended_early(self) -> Job | None:
        """One that has ended with ranks of its own still to be served."""
        ended = [job for job in self.jobs if job.exit and _replica(job) not in self.revival.excused]
        return next((job for job in ended if not self._ranks.finished(self._left_with(job))), None)

    def crashed_late(self, trained: bool) -> list[Job]:
        """Those that crashed in their exit, with all of their ranks done (`trained`: training has ended well). Each is
        told once."""
        for job in self.jobs:
            lanes = self._lanes(job)
            if (trained or self._ranks.finished(lanes)) and not self._ranks.failed(lanes):
                self.served.add(_replica(job))
        late = [job for job in self.jobs if job.died and _replica(job) in self.served - self._told]
        self._told.update(map(_replica, late))
        return late

    def _lanes(self, job: Job) -> list[int]:
        """Its own, wherever they are served now, and those that it serves for others."""
        replica = _replica(job)
        return [lane.index for lane in self._owner.lanes if replica in (lane.teacher, self._home(lane))]

    def _left_with(self, job: Job) -> list[int]:
        """Lanes that nobody takes from it: its own, and those of replicas that are lost."""
        stay = {_replica(job)} | self.revival.lost
        return [lane.index for lane in self._owner.lanes if lane.teacher == _replica(job) and self._home(lane) in stay]

    def _home(self, lane: Lane) -> int:
        return replicas.home(lane.index, self._owner.shape.teachers)


def _replica(job: Job) -> int:
    assert job.spec.replica is not None
    return job.spec.replica
