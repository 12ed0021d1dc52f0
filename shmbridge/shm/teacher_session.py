"""One teacher's side of a session, and of each generation that it serves.

The teacher signs in once and writes its offer into its record once. The startup barrier of each generation: the owner creates
reply memory of the offered size and announces it; the teacher maps it and marks itself ready for the generation; every rank that
waits is rung.
"""

from __future__ import annotations

from shmbridge.errors import AttachError
from shmbridge.output_spec import Offer
from shmbridge.shm.doorbell import Doorbell
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.session import Lane, Participant, Token


class TeacherSession(Participant):
    """One teacher's process. It signs in once; `lanes` and `generation` are those that it has mapped."""

    def __init__(self, token: Token, index: int = 0) -> None:
        """Sign in; the generation of `token` is not looked at. Raises AttachError."""
        super().__init__(token.session_id)
        self.index = index
        self.record = self.control.teachers[index]
        self.record.sign_in()
        self.bell = Doorbell(self.names.teacher_bell(index))
        self.served: list[Lane] = []
        self.own: list[Lane] = []  # whoever serves them now
        self.member_bells: list[list[Doorbell]] = []
        self._published: Offer | None = None

    def publish(self, made: Offer) -> None:
        """Tell what the model returns, once for all generations."""
        self._published = made
        self.record.write_offer(made.encode())

    def next_generation(self) -> bool:
        """Sleep until a generation can be served, and attach to it. False where none follows.

        A generation that ends before this teacher has attached to it is skipped.

        Raises:
            AttachError: its objects are not what they should be.
            PeerLost: the session has failed, or its launcher is gone.
        """
        while generation := self.wait(self._to_be_served, None):
            try:
                self.attach(generation)
            except AttachError:
                self.leave()
                if self._is_open(generation):
                    raise
            else:
                return True
        return False

    def _to_be_served(self) -> int | None:
        """The generation whose replies have memory; 0 where none follows, None where it is waited for."""
        if self.control.ending:
            return 0
        generation = self.control.generation
        is_open = self._is_open(generation) and generation > self.generation
        phase = Phase.OFFERED if is_open else Phase.IDLE
        if self.record.phase is not phase:
            self.record.enter(phase)
        if not is_open or self.control.replies_ready != generation:
            return None
        agreed = self.control.owner.offer
        if self._published and agreed and not self._published.agrees(Offer.decode(agreed)):
            return None  # the owner is to refuse what differs from the session's first offer
        return generation

    def _is_open(self, generation: int) -> bool:
        return self.control.generation == generation > self.control.training_done

    def attach(self, generation: int) -> None:
        """Map the lanes and open the doorbells of a generation, with the settings that its ranks have. Raises AttachError."""
        self._map(generation)
        shape = self.control.shape
        self.served = [lane for lane in self.lanes if lane.teacher == self.index]
        self.own = [lane for lane in self.lanes if lane.index % shape.teachers == self.index]
        for lane in self.lanes:
            names = [self.names.member_bell(generation, lane.index, member) for member in range(shape.members)]
            self.member_bells.append([Doorbell(name) for name in names])

    def leave(self) -> None:
        """Keep none of the generation's lanes and doorbells."""
        self.lanes, self.served, self.own, self.member_bells = [], [], [], []

    def open_barrier(self) -> None:
        """Let every rank that waits at the startup barrier go on."""
        self.record.ready = self.generation
        self.wake_ranks()

    def wake_ranks(self) -> None:
        """Ring every rank, so that it reads the records now."""
        for lane in self.served:
            self.ring_members(lane)

    def ring_members(self, lane: Lane) -> None:
        for bell in self.member_bells[lane.index]:
            bell.ring()

    def adopt(self) -> list[Lane]:
        """Lanes of other teachers that are this one's from now on."""
        adopted = [lane for lane in self.lanes if lane.teacher == self.index and lane not in self.served]
        for lane in adopted:
            lane.ring.take_over()
        self.served += adopted
        return adopted

    def yield_lane(self, lane: Lane) -> None:
        """Hand a lane over to the teacher that is to serve it; nothing of it is in this one's hands."""
        self.served.remove(lane)
        lane.teacher = lane.wanted_teacher
        Doorbell(self.names.teacher_bell(lane.teacher)).ring()

    def gone(self, lane: Lane) -> bool:
        """True once the lane's rank has ended, whether or not it had closed."""
        return lane.records[0].is_alive() is False

    @property
    def training_done(self) -> bool:
        return self.control.training_done >= self.generation
