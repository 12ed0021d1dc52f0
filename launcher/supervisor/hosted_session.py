"""The session that this launcher owns: its shared memory, its teachers, and the generations that they serve.

A run closes it together with its training, and starts no teacher again once it stops. A kept one (teacher.keep) stays open over its
generations: a failure may then end one of them alone, and a teacher that ends is always missed.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from launcher.console.progress import Progress
from launcher.exit_codes import REFUSED
from launcher.planning import machine, memory
from launcher.planning.jobs import JobSpec
from launcher.process.job import Job
from launcher.supervisor import cause
from launcher.supervisor.cause import Cause
from launcher.supervisor.loop import EventLoop
from launcher.supervisor.ranks import Ranks
from launcher.supervisor.session_handle import SessionHandle
from launcher.supervisor.teachers import Teachers
from shmbridge.config import Config
from shmbridge.errors import ShmbridgeError
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Failure, Phase
from shmbridge.shm.session import Token

# Only a look tells how far a teacher has come; a session that serves or idles can be left alone.
_BUSY_S, _SERVING_S, _IDLE_S = 0.1, 1.0, 2.0
LOADING_PHASES = (Phase.ABSENT, Phase.STARTING, Phase.LOADING, Phase.PROBING)
_SERVING_PHASES = (Phase.COLLECTING, Phase.FORWARD, Phase.CLOSED)


class State(enum.Enum):
    """Where a session is: LOADING -> IDLE <-> SERVING -> DRAINING -> IDLE ... -> CLOSED."""

    LOADING = enum.auto()  # a generation may have begun; it is served once the teachers have loaded
    IDLE = enum.auto()  # loaded, and no generation is open
    SERVING = enum.auto()
    DRAINING = enum.auto()  # the generation has ended; a teacher finishes what is left of it
    CLOSED = enum.auto()


class HostedSession(SessionHandle):
    """Owner of a session and of its teachers' jobs."""

    def __init__(self, config: Config, owner: Owner, specs: Sequence[JobSpec], loop: EventLoop) -> None:
        """`specs` are the teachers' jobs, which the first step starts. `owner` is closed by whoever has created it."""
        super().__init__()
        self.view: Owner = owner
        self._config = config
        self._kept = config.teacher.keep
        self._owner = owner
        self._loop = loop
        self._console = loop.console
        self._teachers = Teachers(config, owner, specs, loop)
        self._progress = Progress(loop.console, owner.control.teachers)
        self._has_replies = False
        self._answered = 0  # requests of the generations before this one
        self.done = self._stopping = self._trained = False

    # What is seen

    @property
    def state(self) -> State:
        """It is never stored: it follows from the announcements in the control segment and from the teachers' phases."""
        if self.done:
            return State.CLOSED
        if self._is_open:
            replies = self._owner.control.words[ControlWord.REPLIES_READY]
            return State.SERVING if replies == self._owner.generation else State.LOADING
        gone = {replica.index for replica in self._teachers.replicas if replica.job.exit}
        teachers = [record for record in self._owner.control.teachers if not record.lost]
        if any(record.phase in _SERVING_PHASES and record.rank not in gone for record in teachers):
            return State.DRAINING
        loading = any(record.phase in LOADING_PHASES or record.rank in gone for record in teachers)
        return State.LOADING if loading else State.IDLE

    @property
    def ready(self) -> bool:
        """Every teacher has loaded, and opened the barrier of a generation where one was open."""
        return self._progress.ready

    @property
    def jobs(self) -> list[Job]:
        return [replica.job for replica in self._teachers.replicas]

    @property
    def no_witnesses(self) -> list[int]:
        """All while the session is well: it judges its teachers itself."""
        if self.done or self.failure:
            return self._teachers.excused
        return [replica.index for replica in self._teachers.replicas]

    @property
    def lost(self) -> bool:
        return self._teachers.lost

    @property
    def ended(self) -> bool:
        return not any(job.alive for job in self.jobs)

    @property
    def patience_s(self) -> float:
        if not self.ready:
            return _BUSY_S
        return {State.SERVING: _SERVING_S, State.IDLE: _IDLE_S}.get(self.state, _BUSY_S)

    @property
    def answered(self) -> int:
        """Requests, of all generations."""
        return self._answered + sum(lane.ring.replied for lane in self._owner.lanes)

    @property
    def _is_open(self) -> bool:
        """A generation has begun, and its training group has not ended."""
        return self._owner.generation > self._owner.control.words[ControlWord.TRAINING_DONE]

    # The verbs

    def begin(self, settings: Config, ranks: int) -> Token | None:
        """Raises PlanError where /dev/shm has no room; the next generation may begin then as if nothing had been asked."""
        if self.state not in (State.LOADING, State.IDLE):
            return None
        before, answered = self._owner.settings, self.answered
        try:
            self._owner.describe(settings)
            token = self._owner.start_generation(ranks)
            self._answered, self._stopping = answered, False
            self.ranks = Ranks(self._owner.lanes, ranks, settings.teacher.serve_until == "closed")
            self._create_replies()
        except ShmbridgeError:
            self._owner.describe(before)
            self._owner.end_training()
            raise
        return token

    def end(self) -> None:
        self._owner.end_training()
        for replica in self._teachers.replicas:
            replica.served = False  # ranks that crashed have not finished with it: those of the next generation need it

    def save(self) -> None:
        self._stopping = True
        self._owner.ask_to_stop()  # before any rank ends: its end is then known to be no failure

    def fail(self, failure: Failure) -> None:
        """In a run, every wait of a teacher ends too."""
        if self._kept and not self.failure:
            self._owner.fail_generation(failure)
        else:
            self._owner.fail(failure)

    def close(self, trained: bool = False, failed: int | None = None) -> None:
        self.done, self._trained = True, trained
        self._owner.end_session()
        for replica in self._teachers.replicas:
            if not trained and replica.index != failed and replica.record.phase in LOADING_PHASES:
                replica.job.kill()

    # Looking

    def step(self, now: float) -> None:
        super().step(now)
        if self._trained or (self._is_open and not self.done and not self._kept):
            self._tolerate_late_crashes()
        if self.done or self.failure or (self._stopping and not self._kept):
            return
        try:
            self._teachers.step(now)
            self._agree()
        except ShmbridgeError as error:
            self.failure = cause.of_launcher(str(error), REFUSED)
            return
        self._progress.show()
        excused, oom_kills = self._teachers.excused, self._loop.oom_kills
        found = cause.find(self.jobs, self._owner, oom_kills, excused=excused, teachers_alone=True)
        if found and self._teachers.survives(found, now) and not (self._kept and self._teachers.lost):
            found = None
        self.failure = found or self._ended_early()

    def _agree(self) -> None:
        """The reply memory of a generation that is open, once all teachers have loaded, and its end, once they have left."""
        if self._has_replies and self.state is State.IDLE:
            self._owner.free_replies()
            self._has_replies = False
        try:
            self._create_replies()
        except ShmbridgeError as error:
            if not self._kept:
                raise
            # The session goes on without this generation.
            self.fail(cause.of_launcher(str(error), REFUSED))
            self.end()

    def _create_replies(self) -> None:
        words, generation = self._owner.control.words, self._owner.generation
        agreed = self._owner.offered() if self._is_open and words[ControlWord.REPLIES_READY] != generation else None
        if agreed:
            memory.check_replies(self._config, self.ranks.count, agreed, machine.look(with_gpus=False))
            nbytes = self._owner.create_replies(agreed)
            self._has_replies = True
            self._console.say(
                f"reply memory: {memory.created(self._config, self._owner.control.shape, agreed, nbytes)}"
            )

    def _ended_early(self) -> Cause | None:
        """One that has ended, without a failure, though it is kept, or has ranks still to serve."""
        for replica in self._teachers.replicas:
            if not replica.job.exit or replica.excused:
                continue
            who = replica.job.spec.who
            if self._kept and not replica.job.exit.failed and not replica.job.asked:
                return cause.of_launcher(f"{who} ended although it is kept", 1)
            if not self._kept and not self.ranks.finished(self._teachers.left_with(replica)):
                return cause.of_launcher(f"{who} ended although ranks were still to be served", 1)
        return None

    def _tolerate_late_crashes(self) -> None:
        """A teacher that crashes in its exit, with every rank of its own done, takes nothing from the training. Where no rank has
        connected, its failure is the run's."""
        if len(self.ranks.absent) == self.ranks.count:
            return
        for replica in self._teachers.replicas:
            lanes = self._teachers.lanes(replica)
            if (self._trained or self.ranks.finished(lanes)) and not self.ranks.failed(lanes):
                replica.served = True
            if replica.served and replica.job.died and not replica.crashed_late:
                replica.crashed_late = True
                late = cause.of_job(replica.job, self._loop.oom_kills).sentence
                self._console.say(f"warning: {late} after the ranks had finished with it; see {replica.job.spec.log}")
