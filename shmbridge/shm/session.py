"""A session as everybody but its owner finds it: the token, the names, the control segment, the lanes.

Ranks and teachers attach with the token in SHMBRIDGE_SESSION, `session_id@generation`.

    /dev/shm/shmbridge-ID-control            /dev/shm/sem.shmbridge-ID-teacher0
    /dev/shm/shmbridge-ID-g1-lane0           /dev/shm/sem.shmbridge-ID-g1-rank0.0
    /dev/shm/shmbridge-ID-g1-reply0
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import AttachError, ConfigError, LauncherDied, PeerLost, TeacherDied, TrainerDied
from shmbridge.output_spec import OutputSpec
from shmbridge.shm import layout
from shmbridge.shm.doorbell import Doorbell
from shmbridge.shm.layout import ControlWord, Flag, LaneLayout, LaneWord, Word
from shmbridge.shm.participant_record import Failure, Record
from shmbridge.shm.process import Identity, Peer
from shmbridge.shm.ring import Ring
from shmbridge.shm.segment import Segment

_SPIN_US = 50
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
        positions, rows = (self.chunk_positions, 0) if self.chunks else (self.max_positions, self.max_batch)
        sizes = ((positions if spec.per_token else rows) * spec.item_bytes for spec in outputs)
        return layout.align(sum(map(layout.align, sizes)), layout.PAGE)

    def reply_bytes(self, outputs: tuple[OutputSpec, ...]) -> int:
        """Bytes of one lane's reply segment, with its replies."""
        return layout.reply_bytes(self.reply_slots, self.slot_bytes(outputs))

    @property
    def exchange_bytes(self) -> int:
        """Bytes of one lane's reply segment where the replies lie in GPU memory: the handles of both sides."""
        return layout.PAGE + 3 * layout.exchange_capacity(self.reply_slots)


class Control:
    """Typed access to the control segment."""

    generation = Word(ControlWord.CURRENT_GENERATION)
    replies_ready = Word(ControlWord.REPLIES_READY)  # the generation whose reply segments exist
    training_done = Word(ControlWord.TRAINING_DONE)  # the last generation whose training group has ended
    ending = Flag(ControlWord.SESSION_ENDING)  # no generation follows
    stopping = Flag(ControlWord.STOPPING)  # the user, or the scheduler, has stopped the run

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
        self.owner = Record(segment.bytes[layout.RECORDS_OFFSET :], "launcher", 0)
        starts = (layout.control_bytes(i) for i in range(self.shape.teachers))
        self.teachers = [Record(segment.bytes[start:], "teacher", i) for i, start in enumerate(starts)]

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
    """One lane of one generation as any participant sees it.

    `teacher` is the index of the teacher that serves it: written by that teacher, with nothing of the lane in its hands, or by
    the owner, once it is gone. `wanted_teacher` is the one that is to serve it: written by the owner.
    """

    teacher = Word(LaneWord.TEACHER)
    wanted_teacher = Word(LaneWord.WANTED)

    def __init__(self, segment: Segment, shape: LaneLayout, index: int, generation: int) -> None:
        self.index = index
        self.segment = segment
        self.ring = Ring(segment.bytes, segment.words, shape, generation)
        self.words = segment.words
        self.records = [Record(segment.bytes[shape.record(i) :], "trainer", index) for i in range(shape.members)]

    @classmethod
    def attach(cls, token: Token, shape: Shape, index: int) -> Lane:
        name = Names(token.session_id).lane(token.generation, index)
        segment = Segment.attach(name, layout.LANE, token.session_id, token.generation, index)
        lane = shape.lane_layout
        found = (*(segment.words[word] for word in layout.LANE_CONSTANTS), segment.bytes.nbytes)
        expected = (*lane.constants, layout.align(lane.nbytes, layout.PAGE))
        if found != expected:
            raise AttachError(
                f"segment {name} tells depth, members, tokens, candidates, chunks, size {found}, expected {expected}: "
                "garbled."
            )
        return cls(segment, lane, index, token.generation)


class MappedSession:
    """A session as one process has mapped it: its control segment, and the lanes of one generation.

    Launcher, `status`, `report`, a training group beside a kept teacher and the participants all read a session through it. Owner
    adds what only the session's creator writes.
    """

    def __init__(self, session_id: str, control: Segment | None = None) -> None:
        """Map the session at its current generation; where `control` is given, no generation yet.

        Raises:
            AttachError: the session has ended, or is not what it should be.
        """
        self.session_id = session_id
        self.names = Names(session_id)
        self.control = Control(control or Segment.attach(self.names.control, layout.CONTROL, session_id))
        self.settings = self.control.settings()
        self.generation = 0
        self.lanes: list[Lane] = []
        if control is None:
            self.update()

    @property
    def token(self) -> Token:
        """Of the generation that is mapped."""
        return Token(self.session_id, self.generation)

    def update(self) -> None:
        """Map the generation that is current by now. Raises AttachError."""
        try:
            self._map(self.control.generation)
        except AttachError:  # its lanes were exchanged for those of the next generation meanwhile
            self._map(self.control.generation)

    def _map(self, generation: int) -> None:
        self.control = Control(self.control.segment)  # the number of lanes may be another now
        self.settings, self.generation = self.control.settings(), generation
        shape = self.control.shape
        self.lanes = [Lane.attach(self.token, shape, lane) for lane in range(shape.lanes)] if generation else []

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


class Participant(MappedSession):
    """What a rank and a teacher have in common: a doorbell to wait on, and an owner to watch."""

    bell: Doorbell

    def __init__(self, session_id: str) -> None:
        """Map the control segment, and no generation yet. Raises AttachError."""
        super().__init__(session_id, Segment.attach(Names(session_id).control, layout.CONTROL, session_id))
        self._owner = Peer(self.control.owner_identity)
        self._ends_with = {0}  # failures of these generations end this participant; 0: of the session
        spin_us = self.settings.ring.spin_us
        if (
            spin_us is None
        ):  # a spin saves two wake-ups where every process has a core of its own, and steals from others where not
            shape = self.control.shape
            has_core = len(os.sched_getaffinity(0)) > shape.lanes * shape.members + shape.teachers
            spin_us = _SPIN_US if has_core else 0
        self._spin_s = spin_us / 1e6

    def check(self) -> None:
        """Raise a PeerLost if the session has failed or its owner is gone."""
        failure = self.control.owner.failure
        if failure and failure.generation in self._ends_with:
            raise lost(failure, self.settings.run_dir)
        if not self._owner.alive():
            raise LauncherDied(
                f"the launcher (pid {self._owner.identity.pid}) is gone without a word: killed? Everything of this session ends."
            )

    def wait(
        self, ready: Callable[[], T | None], deadline: float | None, check: Callable[[], None] | None = None
    ) -> T | None:
        """The project's one wait, on this participant's doorbell; `check` in place of the session's own."""
        return self.bell.wait(ready, check or self.check, deadline, self._spin_s)

    def teacher_name(self, teacher: Record) -> str:
        return f"teacher {teacher.rank} ({self.settings.teacher.model})"


def lost(failure: Failure, run: str = "") -> PeerLost:
    """The exception of whoever learns of a failure elsewhere: one line, and where the traceback is; `run` is the directory of
    the run."""
    kind = {"teacher": TeacherDied, "trainer": TrainerDied, "torchrun": TrainerDied}.get(failure.role, LauncherDied)
    first, *more = str(failure).strip().splitlines()
    whole = f" ({'its traceback' if failure.traceback else 'the whole of it'}: {run}/report.txt)"
    return kind(first + (whole if run and (more or failure.traceback) else ""))
