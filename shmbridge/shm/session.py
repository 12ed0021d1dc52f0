"""A run's shared resources as its participants find them: the token, the names, the control segment, the lanes.

Everybody but the owner (owner.py) attaches with the token in SHMBRIDGE_SESSION, `session_id@generation`.

    /dev/shm/shmbridge-ID-control            /dev/shm/sem.shmbridge-ID-teacher0
    /dev/shm/shmbridge-ID-g1-lane0           /dev/shm/sem.shmbridge-ID-g1-rank0.0
    /dev/shm/shmbridge-ID-g1-reply0

A teacher is a process, and a generation is what it serves. It signs in once and writes its offer into its record once. The startup
barrier of each generation: the owner creates reply memory of the offered size and announces it; the teacher maps it and marks
itself ready for the generation; every rank that waits is rung.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from shmbridge import config, log, output_spec
from shmbridge.config import Config
from shmbridge.errors import (
    AttachError,
    ConfigError,
    DeadlineExceeded,
    LauncherDied,
    PeerLost,
    RunStopped,
    TeacherDied,
    TrainerDied,
)
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.shm import layout
from shmbridge.shm.doorbell import Doorbell
from shmbridge.shm.layout import ControlWord, LaneLayout, LaneWord
from shmbridge.shm.process import Identity, Peer
from shmbridge.shm.ring import Ring
from shmbridge.shm.segment import Segment
from shmbridge.shm.status import Failure, Phase, Record

_SPIN_US = 50
_OWNER_SPEAKS_S = 2.0
_STOP_IS_TOLD_S = 0.5
SESSION_VARIABLE = "SHMBRIDGE_SESSION"
OFF = "off"

T = TypeVar("T")


class Token(NamedTuple):
    """What a process needs to find its session; the text of SHMBRIDGE_SESSION."""

    session_id: str
    generation: int

    def __str__(self) -> str:
        return f"{self.session_id}@{self.generation}"

    @classmethod
    def parse(cls, text: str) -> Token:
        found = re.fullmatch(r"([0-9a-f]{32})@([1-9][0-9]{0,8})", text)
        if not found:
            raise AttachError(
                f"{SESSION_VARIABLE} is {text!r}, expected 32 hex digits, `@` and a generation; only shmbridge-launch sets it."
            )
        return cls(found[1], int(found[2]))


class Names:
    """The names of a session's POSIX objects."""

    def __init__(self, session_id: str) -> None:
        self._stem = f"/shmbridge-{session_id}"
        self.control = f"{self._stem}-control"

    def lane(self, generation: int, lane: int) -> str:
        return f"{self._stem}-g{generation}-lane{lane}"

    def reply(self, generation: int, lane: int) -> str:
        return f"{self._stem}-g{generation}-reply{lane}"

    def head(self) -> str:
        return f"{self._stem}-head"

    def teacher_bell(self, teacher: int) -> str:
        return f"{self._stem}-teacher{teacher}"

    def member_bell(self, generation: int, lane: int, member: int = 0) -> str:
        return f"{self._stem}-g{generation}-rank{lane}.{member}"


class Shape(NamedTuple):
    """The numbers that fix a session's layout."""

    lanes: int
    teachers: int
    members: int  # processes that share a lane
    depth: int
    max_tokens: int
    max_batch: int
    max_positions: int
    candidates: int
    chunks: int  # 0 where replies are not streamed
    chunk_positions: int

    @classmethod
    def of(cls, settings: Config, lanes: int, teachers: int = 1) -> Shape:
        """The shape that the settings ask for."""
        ring, payload = settings.ring, settings.payload
        return cls(
            lanes=lanes,
            teachers=teachers,
            members=1,
            depth=ring.depth,
            max_tokens=ring.max_tokens,
            max_batch=ring.max_batch,
            max_positions=min(ring.max_positions or ring.max_tokens, ring.max_tokens),
            candidates=payload.logprobs.candidates if payload.logprobs else 0,
            chunks=payload.stream.chunks if payload.stream else 0,
            chunk_positions=payload.stream.chunk_positions if payload.stream else 0,
        )

    @property
    def lane_layout(self) -> LaneLayout:
        return LaneLayout(self.depth, self.max_tokens, self.candidates, self.chunks, self.members)

    @property
    def reply_slots(self) -> int:
        """Of one lane: one for each slot of the ring, or one for each chunk."""
        return self.chunks or self.depth

    def slot_bytes(self, outputs: tuple[OutputSpec, ...]) -> int:
        """Bytes of one reply slot."""
        if self.chunks:
            return output_spec.slot_bytes(outputs, self.chunk_positions, 0)
        return output_spec.slot_bytes(outputs, self.max_positions, self.max_batch)

    def reply_bytes(self, outputs: tuple[OutputSpec, ...]) -> int:
        """Bytes of one lane's reply segment, with its replies."""
        return layout.reply_bytes(self.reply_slots, self.slot_bytes(outputs))

    @property
    def exchange_bytes(self) -> int:
        """Bytes of one lane's reply segment where the replies lie in GPU memory: the handles of both sides."""
        return layout.PAGE + 3 * layout.exchange_capacity(self.reply_slots)


class Control:
    """Typed access to the control segment."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.words = segment.words
        self.shape = Shape(*self.words[ControlWord.LANES : ControlWord.CHUNK_POSITIONS + 1])
        if not (
            self.shape.lanes >= 1
            and self.shape.members >= 1
            and segment.bytes.nbytes == layout.align(layout.control_bytes(self.shape.teachers), layout.PAGE)
        ):
            raise AttachError(
                f"segment {segment.name} tells the shape {self.shape}, which does not fit its size: garbled."
            )
        self.owner = Record(self._record(0), "launcher", 0)
        self.teachers = [Record(self._record(1 + i), "teacher", i) for i in range(self.shape.teachers)]

    def _record(self, index: int) -> memoryview:
        start = layout.RECORDS_OFFSET + index * layout.RECORD_BYTES
        return self.segment.bytes[start : start + layout.RECORD_BYTES]

    @property
    def owner_identity(self) -> Identity:
        return Identity(self.words[ControlWord.OWNER_PID], self.words[ControlWord.OWNER_START])

    def settings(self) -> Config:
        nbytes = self.words[ControlWord.SETTINGS_NBYTES]
        if nbytes > layout.SETTINGS_CAPACITY:
            raise AttachError(f"segment {self.segment.name} tells {nbytes} bytes of settings: garbled.")
        text = self.segment.bytes[layout.SETTINGS_OFFSET : layout.SETTINGS_OFFSET + nbytes]
        try:
            return config.from_json(bytes(text))
        except ConfigError as error:
            raise AttachError(f"segment {self.segment.name} holds garbled settings: {error}.") from None


class Lane:
    """One lane of one generation as any participant sees it."""

    def __init__(self, segment: Segment, shape: LaneLayout, index: int, generation: int) -> None:
        self.index = index
        self.segment = segment
        self.ring = Ring(segment.bytes, segment.words, shape, generation)
        self.records = [
            Record(segment.bytes[start : start + layout.RECORD_BYTES], "trainer", index)
            for start in map(shape.record, range(shape.members))
        ]

    @property
    def teacher(self) -> int:
        """The index of the teacher that serves it."""
        return self.segment.words[LaneWord.TEACHER]

    @property
    def wanted_teacher(self) -> int:
        """The index of the teacher that is to serve it."""
        return self.segment.words[LaneWord.WANTED]

    def hand_over(self, teacher: int) -> None:
        """By the teacher that serves it, with nothing of the lane in its hands; or by the owner, once that one is gone."""
        self.segment.words[LaneWord.TEACHER] = teacher

    @classmethod
    def attach(cls, token: Token, shape: Shape, index: int) -> Lane:
        name = Names(token.session_id).lane(token.generation, index)
        segment = Segment.attach(name, layout.LANE, token.session_id, token.generation, index)
        lane = shape.lane_layout
        words = segment.words
        found = (*(words[word] for word in layout.LANE_CONSTANTS), segment.bytes.nbytes)
        expected = (*lane.constants, layout.align(lane.nbytes, layout.PAGE))
        if found != expected:
            raise AttachError(
                f"segment {name} tells depth, members, tokens, candidates, chunks, size {found}, expected {expected}: "
                "garbled."
            )
        return cls(segment, lane, index, token.generation)


class MappedSession:
    """A session as one process has mapped it: its control segment, and the lanes of one generation.

    The launcher, `status`, `report` and a training group beside a kept teacher all read a session through it. Owner adds what only
    the session's creator writes.
    """

    def __init__(self, session_id: str, created: Segment | None = None) -> None:
        """Map the session at its current generation; or, by its owner, the control segment that it has `created`.

        Raises:
            AttachError: the session has ended, or is not what it should be.
        """
        self.session_id = session_id
        self.names = Names(session_id)
        self.control = Control(created or Segment.attach(self.names.control, layout.CONTROL, session_id))
        self.settings = self.control.settings()
        self.generation = 0
        self.lanes: list[Lane] = []
        if created is None:
            self.update()

    @property
    def current(self) -> int:
        """The generation that the session is at by now."""
        return self.control.words[ControlWord.CURRENT_GENERATION]

    def update(self) -> None:
        """Map the generation that is current by now. Raises AttachError."""
        try:
            self._map(self.current)
        except AttachError:  # its lanes were exchanged for those of the next generation meanwhile
            self._map(self.current)

    def _map(self, generation: int) -> None:
        self.control = Control(self.control.segment)  # the number of lanes may be another now
        self.settings, self.generation = self.control.settings(), generation
        token, shape = Token(self.session_id, generation), self.control.shape
        self.lanes = [Lane.attach(token, shape, lane) for lane in range(shape.lanes)] if generation else []

    def failures(self) -> list[Failure]:
        """Of this generation's ranks, and what the owner has found that ends the generation or the session: causes before
        consequences, the earliest first."""
        found = [failure for lane in self.lanes for record in lane.records if (failure := record.failure)]
        told = self.control.owner.failure
        if told and (not told.generation or (told.generation == self.generation and told.role == "launcher")):
            found.append(told)  # else it is what the generation's own launcher has told
        return by_cause(found)


def by_cause(failures: Iterable[Failure]) -> list[Failure]:
    """Causes before consequences, the earliest first."""
    return sorted(failures, key=lambda failure: (failure.consequence, failure.at_ns))


class _Attached:
    """What a trainer and a teacher have in common: the control segment, and a liveness check of its owner."""

    def __init__(self, token: Token) -> None:
        self.token = token
        self.names = Names(token.session_id)
        self.control = Control(Segment.attach(self.names.control, layout.CONTROL, token.session_id))
        self.settings = self.control.settings()
        self._spin_s = self._spin_us() / 1e6
        self._owner = Peer(self.control.owner_identity)

    def _spin_us(self) -> int:
        """A spin saves two wake-ups where every process has a core of its own, and steals from the others where not."""
        if self.settings.ring.spin_us is not None:
            return self.settings.ring.spin_us
        processes = self.control.shape.lanes * self.control.shape.members + self.control.shape.teachers
        return _SPIN_US if len(os.sched_getaffinity(0)) > processes else 0

    def check(self) -> None:
        """Raise a PeerLost if the session has failed or its owner is gone."""
        failure = self.control.owner.failure
        if failure and self._ended_by(failure):
            raise lost(failure, self.settings.run_dir)
        if not self._owner.alive():
            raise LauncherDied(
                f"the launcher (pid {self._owner.identity.pid}) is gone without a word: killed? Everything of this session ends."
            )

    def _ended_by(self, failure: Failure) -> bool:
        """Whether what the owner has announced ends this participant too."""
        return failure.generation == 0

    def teacher_name(self, teacher: int) -> str:
        return f"teacher {teacher} ({self.settings.teacher.model})"


class TrainerSession(_Attached):
    """One training rank's side of a session: its lane, its doorbell, its teacher's."""

    def __init__(self, token: Token, lane: int) -> None:
        """Attach and sign in.

        Raises:
            AttachError: the session is gone, or has no such lane, or another live process holds it.
        """
        super().__init__(token)
        self._check_generation()
        lanes = self.control.shape.lanes
        if not 0 <= lane < lanes:
            raise AttachError(
                f"this rank asks for lane {lane}, the session has lanes 0 to {lanes - 1}: "
                "start as many ranks as --train-gpus (or --cpu) says."
            )
        self.lane = Lane.attach(token, self.control.shape, lane)
        self.ring = self.lane.ring
        self.record = self.lane.records[0]
        self._sign_in()
        self._open_bells()
        self._is_open = True
        self._reopened = False
        self.plane: Any = None  # a planes.RankPlane: memory and events are opened once in the life of a process
        self.plane_device: object = None
        self._teacher_peer: Peer | None = None
        self._outlives_teacher = self.settings.teacher.restarts > 0 or self.settings.on_teacher_lost != "stop"
        self._missed: Identity | None = None  # the teacher whose end was told
        self._stopped_since: float | None = None  # the teacher has ended in a run that stops
        self.stop: Callable[[], bool] = lambda: False  # whether this rank's waits are to end, because it has to save

    def _check_generation(self) -> None:
        current = self.control.words[ControlWord.CURRENT_GENERATION]
        if self.token.generation != current:
            raise AttachError(
                f"this process belongs to generation {self.token.generation} of the session, which is at generation {current}: "
                "it was left behind by a restart and must end."
            )

    def _sign_in(self) -> None:
        with self.lane.segment.lock() as locked:
            holder = self.record.identity
            if holder or not locked:
                who = f"pid {holder.pid}" if holder else "another process at this moment"
                raise AttachError(
                    f"lane {self.lane.index} was taken by {who}, this process is pid {os.getpid()}: two processes have the same "
                    "LOCAL_RANK. A lane belongs to one process, also after that has closed its bridge or has ended: connect in one "
                    "process of each rank, or give connect(lane=...)."
                )
            self.record.sign_in()
        self.record.set_ready(self.token.generation)

    def _open_bells(self) -> None:
        self.bell = Doorbell(self.names.member_bell(self.token.generation, self.lane.index))
        self._teacher_bells = [Doorbell(self.names.teacher_bell(i)) for i in range(len(self.control.teachers))]

    def reopen(self) -> None:
        """Begin anew on the lane that this process has, closed or not. `Requests` cancels what it had submitted.

        Raises:
            AttachError: the session has ended, or the teacher has, because every rank had closed.
            PeerLost: see `check`.
        """
        self._check_generation()
        self._reopened = True
        self.stop = lambda: False
        if not self._is_open:
            self._open_bells()
        try:
            self.check()
        except BaseException:
            if not self._is_open:
                self._close_bells()
            raise
        self._is_open = True
        self.record.reset()
        self.ring.open_requests()

    @property
    def teacher_index(self) -> int:
        """The teacher that serves this lane now. Raises AttachError."""
        index = self.lane.teacher
        if index >= len(self.control.teachers):
            raise AttachError(f"segment {self.lane.segment.name} names teacher {index}: garbled.")
        return index

    @property
    def teacher(self) -> Record:
        return self.control.teachers[self.teacher_index]

    def ring_teacher(self) -> None:
        self._teacher_bells[self.teacher_index].ring()

    @property
    def asked_to_stop(self) -> bool:
        """The user, or the scheduler, has stopped the run."""
        return self.control.words[ControlWord.STOPPING] != 0

    def is_told_to_stop(self) -> bool:
        """`asked_to_stop`, which this rank's own signal may be ahead of by a moment."""
        told = self.bell.wait(lambda: self.asked_to_stop or None, lambda: None, time.monotonic() + _STOP_IS_TOLD_S)
        return told is not None

    def check(self) -> None:
        """Raise a PeerLost if the session has failed, or its owner or this lane's teacher is gone.

        Where a teacher may be started again, its end is told and waited out: whether one comes is the owner's word."""
        if self.stop():
            raise RunStopped("the run is to stop.")
        teacher = self.teacher
        failure = teacher.failure
        if failure and not failure.consequence and not self._outlives_teacher:
            raise lost(failure, self.settings.run_dir)
        try:
            super().check()
        except LauncherDied as error:
            if self.asked_to_stop and self._owner.alive():
                raise RunStopped(str(error)) from None
            raise
        if self._reopened and self._has_ended(teacher):
            raise AttachError(
                f"{self.teacher_name(self.teacher_index)} has ended, because every rank had closed its bridge; this one connects "
                "again. Set teacher.serve_until=exited: the teacher then stays until the ranks' processes have ended."
            )
        who = teacher.identity
        if teacher.lost and teacher is self.teacher:  # the lane may have gone to another before
            raise TeacherDied(f"{self.teacher_name(self.teacher_index)} is lost, and no new one comes.")
        if who is None:
            return
        if self._teacher_peer is None or self._teacher_peer.identity != who:
            self._teacher_peer = Peer(who)
        if self._teacher_peer.alive():
            return
        gone = f"{self.teacher_name(self.teacher_index)}, pid {who.pid}, is gone; it was in phase {teacher.phase}."
        if self.asked_to_stop and self._owner_is_to_speak():
            return
        if not self._outlives_teacher:
            raise TeacherDied(gone)
        if self._missed != who:
            self._missed = who
            log.logger.warning("rank %d: %s Waiting for a new one.", self.lane.index, gone)

    def _has_ended(self, teacher: Record) -> bool:
        """It has served this generation to the end, and training has not ended."""
        over = teacher.ready == self.token.generation and teacher.phase in (Phase.CLOSED, Phase.IDLE)
        return over and not self.asked_to_stop

    def _ended_by(self, failure: Failure) -> bool:
        return failure.generation in (0, self.token.generation)

    def _owner_is_to_speak(self) -> bool:
        """In a run that stops, teachers end; for a moment the owner's word on it is waited for."""
        now = time.monotonic()
        self._stopped_since = self._stopped_since or now
        return now - self._stopped_since < _OWNER_SPEAKS_S

    def wait(self, ready: Callable[[], T | None], deadline: float | None) -> T | None:
        """The project's one wait, on this rank's doorbell."""
        return self.bell.wait(ready, self.check, deadline, self._spin_s)

    def wait_ready(self, timeout_s: float) -> Offer:
        """Sleep until the teacher's model is loaded; what it offers.

        Raises:
            DeadlineExceeded: it is still loading; says how far it is.
            RunStopped: the run was stopped while it loaded.
            TeacherDied, LauncherDied, TrainerDied: see `check`.
        """
        generation = self.token.generation
        self.record.enter(Phase.BARRIER)
        teachers = self.control.teachers  # all of them: teacher 0 writes what is shared, such as the output head

        def ready_or_stopped() -> bool | None:
            if all(teacher.ready == generation or teacher.lost for teacher in teachers):
                return True
            return False if self.asked_to_stop else None

        try:
            ready = self.wait(ready_or_stopped, time.monotonic() + timeout_s)
        finally:
            self.record.enter(Phase.TRAINING)
        if ready is None:
            raise DeadlineExceeded(self._late_teacher(timeout_s)).within(str(Phase.BARRIER))
        if not ready:
            raise RunStopped("the run was stopped while the teacher was loading.")
        text = self.teacher.offer
        if text is None:
            raise AttachError(f"{self.teacher_name(self.teacher_index)} is ready but made no offer: garbled.")
        return Offer.decode(text)

    def _late_teacher(self, timeout_s: float) -> str:
        teacher = next((t for t in self.control.teachers if t.ready != self.token.generation), self.teacher)
        name = self.teacher_name(teacher.rank)
        if teacher.identity is None:
            where = "has not attached to the session"
        else:
            done, total = teacher.progressed
            share = f" ({done} of {total})" if total else ""
            where = (
                f"(pid {teacher.identity.pid}) is in phase {teacher.phase}{share} for {teacher.seconds_in_phase:.0f} s"
            )
        return f"at the startup barrier {name} {where} after {timeout_s:g} s; see its log, or raise timeouts.startup_s."

    def close(self) -> None:
        """Tell that no request follows. Memory stays mapped while tensors of the caller look into it."""
        self.ring.close_requests()
        self.record.enter(Phase.CLOSED)
        self.ring_teacher()
        self._close_bells()
        self._is_open = False

    def _close_bells(self) -> None:
        for bell in (*self._teacher_bells, self.bell):
            bell.close()


class TeacherSession(_Attached):
    """One teacher's process. It signs in once; `lanes` and `token` are those of the generation that it is attached to."""

    def __init__(self, token: Token, index: int = 0) -> None:
        """Sign in; the generation of `token` is not looked at. Raises AttachError."""
        super().__init__(token)
        self.index = index
        self.record = self.control.teachers[index]
        self.record.sign_in()
        self.bell = Doorbell(self.names.teacher_bell(index))
        self.lanes: list[Lane] = []
        self.own: list[Lane] = []  # whoever serves them now
        self.member_bells: list[list[Doorbell]] = []
        self._every: list[Lane] = []
        self._ranks: dict[int, Peer] = {}
        self._published: Offer | None = None
        self._latest = 0  # generation that it has attached to

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
        words = self.control.words
        if words[ControlWord.SESSION_ENDING]:
            return 0
        generation = words[ControlWord.CURRENT_GENERATION]
        is_open = self._is_open(generation) and generation > self._latest
        phase = Phase.OFFERED if is_open else Phase.IDLE
        if self.record.phase is not phase:
            self.record.enter(phase)
        return generation if is_open and words[ControlWord.REPLIES_READY] == generation and self._agrees() else None

    def _is_open(self, generation: int) -> bool:
        words = self.control.words
        return words[ControlWord.CURRENT_GENERATION] == generation > words[ControlWord.TRAINING_DONE]

    def _agrees(self) -> bool:
        """What differs from the session's first offer waits for the owner to refuse it."""
        agreed = self.control.owner.offer
        return self._published is None or agreed is None or self._published.agrees(Offer.decode(agreed))

    def attach(self, generation: int) -> None:
        """Map the lanes and open the doorbells of a generation, with the settings that its ranks have. Raises AttachError."""
        self._latest = generation
        self.token = self.token._replace(generation=generation)
        self.control = Control(self.control.segment)  # the number of lanes may be another now
        self.settings = self.control.settings()
        shape = self.control.shape
        self._every = [Lane.attach(self.token, shape, i) for i in range(shape.lanes)]
        self.lanes = [lane for lane in self._every if lane.teacher == self.index]
        self.own = [lane for lane in self._every if lane.index % shape.teachers == self.index]
        for lane in self._every:
            names = [self.names.member_bell(generation, lane.index, member) for member in range(shape.members)]
            self.member_bells.append([Doorbell(name) for name in names])

    def leave(self) -> None:
        """Close the generation's doorbells, and keep none of its lanes."""
        for bell in (bell for bells in self.member_bells for bell in bells):
            bell.close()
        self._every, self.lanes, self.own, self.member_bells = [], [], [], []
        self._ranks = {}

    def open_barrier(self) -> None:
        """Let every rank that waits at the startup barrier go on."""
        self.record.set_ready(self.token.generation)
        self.wake_ranks()

    def wake_ranks(self) -> None:
        """Ring every rank, so that it looks at the board now."""
        for lane in self.lanes:
            self.ring_members(lane)

    def ring_members(self, lane: Lane) -> None:
        for bell in self.member_bells[lane.index]:
            bell.ring()

    def wait(
        self, ready: Callable[[], T | None], deadline: float | None, check: Callable[[], None] | None = None
    ) -> T | None:
        """The project's one wait, on this teacher's doorbell; `check` in place of the session's own."""
        return self.bell.wait(ready, check or self.check, deadline, self._spin_s)

    def adopt(self) -> list[Lane]:
        """Lanes of other teachers that are this one's from now on."""
        adopted = [lane for lane in self._every if lane.teacher == self.index and lane not in self.lanes]
        for lane in adopted:
            lane.ring.take_over()
        self.lanes += adopted
        return adopted

    def yield_lane(self, lane: Lane) -> None:
        """Hand a lane over to the teacher that is to serve it; nothing of it is in this one's hands."""
        self.lanes.remove(lane)
        lane.hand_over(lane.wanted_teacher)
        bell = Doorbell(self.names.teacher_bell(lane.wanted_teacher))
        bell.ring()
        bell.close()

    def gone(self, lane: Lane) -> bool:
        """True once the lane's rank has ended, whether or not it had closed."""
        peer = self._ranks.get(lane.index)
        if peer is None:
            who = lane.records[0].identity
            if who is None:
                return False
            peer = self._ranks[lane.index] = Peer(who)
        return not peer.alive()

    @property
    def training_done(self) -> bool:
        return self.control.words[ControlWord.TRAINING_DONE] >= self.token.generation


def lost(failure: Failure, run: str = "") -> PeerLost:
    """The exception of whoever learns of a failure elsewhere: one line, and where the traceback is; `run` is the directory of
    the run."""
    kind = {"teacher": TeacherDied, "trainer": TrainerDied, "torchrun": TrainerDied}.get(failure.role, LauncherDied)
    first, *more = str(failure).strip().splitlines()
    whole = f" ({'its traceback' if failure.traceback else 'the whole of it'}: {run}/report.txt)"
    return kind(first + (whole if run and (more or failure.traceback) else ""))
