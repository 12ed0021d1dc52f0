"""The teachers of a session: one job for each replica, and what becomes of one that has died.

A teacher that was ready once is started again teacher.restarts times. Its ranks wait, or are served by the other replicas
meanwhile: the lanes of a dead teacher are given to living ones, and asked back for the new one once it is ready. What was
submitted and not answered is in the ring; whoever serves the lane next answers it.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.console.text import seconds
from launcher.planning import placement
from launcher.planning.jobs import JobSpec
from launcher.process.job import Job
from launcher.supervisor.cause import Cause
from launcher.supervisor.loop import EventLoop
from shmbridge.config import Config
from shmbridge.errors import PlanError
from shmbridge.output_spec import Offer
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Phase, Record
from shmbridge.shm.session import Lane

_LONGEST_PAUSE_S = 60.0


class Replica:
    """One teacher, from its first process to the last that was started in its place."""

    def __init__(self, record: Record, job: Job) -> None:
        self.index = record.rank
        self.record = record
        self.job = job
        self.was_ready = False
        self.died_at: float | None = None  # it is not ready again since then; monotonic seconds, as all times here
        self.due_at: float | None = None  # when the next process is to be started
        self.lost = False  # no new one follows, and training goes on without it
        self.served = False  # its ranks have finished with it, without a failure
        self.crashed_late = False  # after that

    @property
    def excused(self) -> bool:
        """Its death ends no run: it is lost, or a new one is coming."""
        return self.lost or self.due_at is not None


class Teachers:
    """Of one session. Lane i is replica i % replicas' own."""

    def __init__(self, config: Config, owner: Owner, specs: Sequence[JobSpec], loop: EventLoop) -> None:
        """The first step starts a job for each replica."""
        self.replicas: list[Replica] = []  # empty until then
        self._config = config
        self._owner = owner
        self._specs = specs
        self._loop = loop
        self._agreed: Offer | None = None
        self._started = 0  # in the place of dead ones

    @property
    def lost(self) -> bool:
        """None is there any more, and none will come."""
        return bool(self.replicas) and all(replica.lost for replica in self.replicas)

    @property
    def excused(self) -> list[int]:
        """Replicas whose end is no failure."""
        return [replica.index for replica in self.replicas if replica.served or replica.excused]

    def step(self, now: float) -> None:
        """Take note of those that are ready, give the lanes of the dead to the living, start the new ones that are due.

        Raises:
            PlanError: two return different things, or a new one returns something else than the one before it.
        """
        if not self.replicas:
            pairs = zip(self._owner.control.teachers, self._specs, strict=True)
            self.replicas = [Replica(record, self._loop.start(spec)) for record, spec in pairs]
        self._agreed = self._agreed or self._owner.offered()
        generation = self._owner.generation
        for replica in self.replicas:
            if replica.died_at is not None:
                self._refuse_other(replica)
            # It has loaded and waits for a generation, or serves the current one.
            ready = replica.record.phase is Phase.IDLE or 0 < generation == replica.record.ready
            if ready and not replica.excused:
                replica.was_ready = True
                if replica.died_at is not None:
                    self._loop.console.say(f"{self._called(replica)} is back after {seconds(now - replica.died_at)}")
                    replica.died_at = None
                    self._ask_lanes_back(replica)
        self._give_lanes_away()
        for replica in self.replicas:
            if replica.due_at is not None and replica.job.exit and now >= replica.due_at:
                replica.due_at = None
                replica.record.clear()
                replica.job = self._loop.start(replica.job.spec)

    def survives(self, found: Cause, now: float) -> bool:
        """Whether the session goes on although this teacher has died; what is needed for it is begun."""
        replica = self.replicas[found.rank]
        if not replica.was_ready:
            return False  # it never loaded: the next one would not either
        pause_s = self._pause_s(now - (replica.died_at or now))
        if pause_s is None and self._config.on_teacher_lost != "continue":
            return False
        replica.job.kill()
        replica.died_at = replica.died_at or now
        if pause_s is None:
            replica.lost = True
            self._loop.console.say(
                f"{found.sentence}; no new one follows, and training goes on (on_teacher_lost=continue)"
            )
            return True
        self._started += 1
        replica.due_at = now + pause_s
        allowed = self._config.teacher.restarts
        often = f"restart {self._started} of {allowed}" if self._started <= allowed else "on_teacher_lost=wait"
        self._loop.console.say(f"{found.sentence}; training waits for a new one ({often})")
        return True

    def _pause_s(self, gone_s: float) -> float | None:
        """How long to wait before the next start; None: there is none."""
        beyond = self._started - self._config.teacher.restarts
        if beyond < 0:
            return 0.0 if self._started == 0 else min(2.0 ** (self._started - 1), _LONGEST_PAUSE_S)
        if self._config.on_teacher_lost == "wait" and gone_s < self._config.timeouts.request_s:
            return min(2.0**beyond, _LONGEST_PAUSE_S)
        return None

    def _refuse_other(self, replica: Replica) -> None:
        text = replica.record.offer
        found = Offer.decode(text).differs(self._agreed) if text is not None and self._agreed else ""
        if found:
            raise PlanError(
                f"the new {self._called(replica)} offers something else than the first one: {found}. Did the model change on the "
                "disk?"
            )

    def _called(self, replica: Replica) -> str:
        return placement.teacher_name(replica.index, len(self.replicas))

    # Lanes

    def lanes(self, replica: Replica) -> list[int]:
        """Its own, wherever they are served now, and those that it serves for others."""
        return [lane.index for lane in self._owner.lanes if replica.index in (lane.teacher, self._home(lane))]

    def left_with(self, replica: Replica) -> list[int]:
        """Lanes that nobody takes from it: its own, and those of replicas that are lost."""
        stay = {replica.index} | {other.index for other in self.replicas if other.lost}
        return [lane.index for lane in self._owner.lanes if lane.teacher == replica.index and self._home(lane) in stay]

    def _home(self, lane: Lane) -> int:
        return placement.replica_of(lane.index, len(self.replicas))

    def _ask_lanes_back(self, replica: Replica) -> None:
        for lane in self._owner.lanes:
            if self._home(lane) == replica.index != lane.teacher:
                self._owner.ask_to_hand_over(lane.index, replica.index)

    def _give_lanes_away(self) -> None:
        """Lanes of replicas that have no process: to their own replica where it lives, else to the living in turn."""
        ended = {replica.index for replica in self.replicas if replica.job.exit}
        excused = {replica.index for replica in self.replicas if replica.excused}
        living = [
            replica.index
            for replica in self.replicas
            if replica.died_at is None
            and replica.index not in ended
            and replica.record.ready == self._owner.generation
            and replica.record.phase is not Phase.CLOSED
        ]
        for lane in self._owner.lanes:
            home = self._home(lane)
            if lane.teacher in ended and living and (lane.teacher in excused or lane.teacher != home):
                heir = home if home in living else living[lane.index % len(living)]
                self._owner.hand_over(lane.index, heir)
            elif lane.wanted_teacher in ended & excused and lane.teacher not in ended:
                self._owner.ask_to_hand_over(lane.index, lane.teacher)  # it stays where it is
        for replica in self.replicas:
            if replica.lost and replica.job.exit and not replica.record.lost:
                replica.record.lost = True
                self._owner.ring_all()
