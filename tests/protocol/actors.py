"""A teacher and a rank small enough to be killed anywhere: the protocol of docs/design.md without torch.

They do to the ring, the doorbells and the records what teacher/replies.py and rank/in_flight.py do. Every byte that they send
is a function of (generation, sequence, chunk), so that whoever reads can tell whether it is what it asked for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import cache
from typing import Literal

from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import DeadlineExceeded, TrainerDied
from shmbridge.output_spec import Extent, Offer, OutputSpec
from shmbridge.shm import layout
from shmbridge.shm.layout import Header
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.ring import Composition, Ring
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Names, Token
from shmbridge.shm.teacher_session import TeacherSession

TOKENS = 8
NBYTES = 64  # of the IDs, of a reply and of a chunk
OFFER = Offer((OutputSpec("out", "uint8", ("seq", NBYTES // TOKENS)),), "tiny")
CHUNKS_OF_A_REPLY = 3
FAILS = 13  # the step of a request that the teacher answers with an error
PATIENCE_S = 20.0


class Broken(AssertionError):
    """An invariant of docs/design.md does not hold."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


@cache
def settings(depth: int = 2, chunks: int = 0) -> Config:
    """Of the smallest session; streamed where `chunks` is not 0."""
    overrides = ["teacher.model=tests:tiny", f"ring.max_tokens={TOKENS}", f"ring.depth={depth}", "ring.spin_us=0"]
    if chunks:
        overrides += [f"payload.stream.chunks={chunks}", f"payload.stream.chunk_positions={TOKENS}"]
    return config.load(overrides=overrides)


def content(kind: Literal["ids", "reply"], generation: int, sequence: int, chunk: int = 0) -> bytes:
    """The bytes of one request, reply or chunk, unlike those of any other."""
    return hashlib.blake2b(f"{kind} {generation} {sequence} {chunk}".encode(), digest_size=NBYTES).digest()


def composition(generation: int, sequence: int) -> Composition:
    """What a reply's head says, unlike any other's."""
    return Composition(100 * generation + sequence, 0, 1, TOKENS, TOKENS, 7)


class Witness:
    """Looks at a lane's cursors: they keep their order, and only grow."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._last = (0,) * 6

    def look(self) -> None:
        ring = self.ring
        released, replied, requested = ring.released, ring.replied, ring.requested
        consumed, streamed, abandoned = ring.consumed, ring.streamed, ring.abandoned
        now = (released, replied, requested, consumed, streamed, abandoned)
        require(released <= replied <= requested <= released + ring.depth, f"cursors out of order: {now}")
        require(consumed <= streamed <= consumed + ring.layout.chunks, f"chunk cursors out of order: {now}")
        require(abandoned <= requested, f"abandoned beyond requested: {now}")
        require(all(a <= b for a, b in zip(self._last, now, strict=True)), f"a cursor fell: {self._last} to {now}")
        self._last = now


class TinyPlane:
    """The reply segment as plain bytes, one slot a page."""

    def __init__(self, token: Token, slots: int, lane: int = 0) -> None:
        name = Names(token.session_id).reply(token.generation, lane)
        self._memory = Segment.attach(name, layout.REPLY, token.session_id, token.generation, lane).bytes
        self._slots = slots

    def _slot(self, number: int) -> memoryview:
        at = layout.PAGE * (1 + number % self._slots)
        return self._memory[at : at + NBYTES]

    def write(self, number: int, data: bytes) -> None:
        half = NBYTES // 2
        self._slot(number)[:half] = data[:half]
        self._slot(number)[half:] = data[half:]

    def read(self, number: int) -> bytes:
        return bytes(self._slot(number))


class TinyTeacher:
    """Serves one lane: the oldest request first, a reply in chunks where the session streams."""

    def __init__(self, session: TeacherSession) -> None:
        self.session = session
        self._sent: int | None = None  # chunks of the reply that is being streamed

    def open(self) -> None:
        """Publish what it returns, attach to the generation, open the barrier. Nothing is served where no generation comes."""
        self.session.publish(OFFER)
        if self.session.next_generation():
            self.map()
            self.session.open_barrier()
            self.session.record.enter(Phase.COLLECTING)

    def map(self) -> None:
        """Of the generation that is attached to."""
        self.lane = self.session.served[0]
        self.ring = self.lane.ring
        self.generation = self.session.generation
        self.plane = TinyPlane(self.session.token, self.session.control.shape.reply_slots)

    def serve(self) -> None:
        """Until the rank has closed. Raises PeerLost."""
        if not self.session.served:
            return
        while (moved := self.session.wait(self.move_or_end, time.monotonic() + PATIENCE_S, self.check)) is not False:
            require(moved, "the teacher hangs")
        require(self.ring.replied == self.ring.requested, "the teacher ends and has not answered what was submitted")
        self.session.record.enter(Phase.CLOSED)

    def check(self) -> None:
        """Who is gone will neither submit nor read."""
        self.session.check()
        if self.session.gone(self.lane):
            who = self.lane.records[0].identity
            raise TrainerDied(f"rank 0, pid {who and who.pid}, is gone without closing")

    def move_or_end(self) -> bool | None:
        """Make one move: True. None where there is nothing to do, False where there never will be."""
        ended = self.ring.closed or self.session.training_done  # before the last look at the requests
        if self.move():
            return True
        return False if ended and self._sent is None else None

    def move(self) -> bool:
        """Answer the oldest request, or send one chunk of its reply. False where that is not possible."""
        sequence = self.ring.next_request()
        if sequence is None:
            return False
        if self._sent is not None:
            return self._stream(sequence)
        request = self.ring.read_request(sequence)
        require(
            bytes(request.ids) == content("ids", self.generation, sequence), f"the IDs of {sequence} are not its own"
        )
        if sequence < self.ring.abandoned:
            self.ring.skip_reply(sequence)
            self._publish(sequence)
        elif request.step == FAILS:
            self.answer(sequence, f"error {self.generation} {sequence}")
        elif self.ring.layout.chunks:
            self._sent = 0
        else:
            self.plane.write(sequence, content("reply", self.generation, sequence))
            self.answer(sequence)
        return True

    def _stream(self, sequence: int) -> bool:
        assert self._sent is not None
        unread = self.ring.abandoned > sequence or self.ring.closed
        if self._sent == CHUNKS_OF_A_REPLY or unread:
            self._sent = None
            self.answer(sequence)
            return True
        if not self.ring.has_room():
            return False
        self.plane.write(self.ring.streamed, content("reply", self.generation, sequence, self._sent))
        self.ring.write_chunk(sequence, self._sent * TOKENS, TOKENS)
        self.ring.publish_chunk()
        self.session.ring_members(self.lane)
        self._sent += 1
        return True

    def answer(self, sequence: int, error: str | None = None) -> None:
        self.ring.write_reply(sequence, composition(self.generation, sequence), error)
        self._publish(sequence)

    def _publish(self, sequence: int) -> None:
        self.ring.seal_reply(sequence)
        self.ring.publish_reply(sequence)
        self.session.ring_members(self.lane)


class TinyRank:
    """Submits, waits, reads and releases."""

    def __init__(self, session: RankSession) -> None:
        self.session = session
        self.ring = session.ring
        self.generation = session.generation
        self.waits_for: int | None = None

    def open(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait at the barrier and map the reply memory. Raises PeerLost, DeadlineExceeded."""
        found = self.session.wait_ready(timeout_s)
        require(found == OFFER, "the offer is not the teacher's")
        self.plane = TinyPlane(self.session.token, self.session.control.shape.reply_slots)

    def submit(self, step: int | None = None) -> int:
        sequence = self.ring.claim()
        ids = memoryview(content("ids", self.generation, sequence))
        self.ring.write_request(sequence, step, Extent(1, TOKENS), ids)
        self.ring.publish_request(sequence)
        self.session.ring_teacher()
        self.session.record.at(step, sequence)
        return sequence

    def wait(self, sequence: int) -> None:
        """Sleep until `sequence` is answered. Raises PeerLost."""
        self._sleep(sequence, lambda: self.ring.answered(sequence))

    def read(self, sequence: int, error: bool = False) -> None:
        """Check that the reply is the one to `sequence`, or the error that it asked for."""
        head, told = self.ring.read_reply(sequence), f"error {self.generation} {sequence}" if error else None
        require(
            head.composition == composition(self.generation, sequence), f"the head of {sequence} is another's: {head}"
        )
        require(head.error == told, f"sequence {sequence} raised {head.error!r}, expected {told!r}")
        if not error and not self.ring.layout.chunks:
            found = self.plane.read(sequence)
            require(found == content("reply", self.generation, sequence), f"the reply to {sequence} is another's")

    def take(self, sequence: int) -> None:
        """Wait, read, release."""
        self.wait(sequence)
        self.read(sequence)
        self.ring.release(sequence)

    def chunk(self, sequence: int, part: int) -> None:
        """Wait for chunk `part` of the reply to `sequence`, read it and give it back."""

        def ready() -> bool | None:
            before = self.ring.consumed
            found = self.ring.next_chunk(sequence) is not None
            if self.ring.consumed != before:  # chunks of an abandoned reply: there is room again
                self.session.ring_teacher()
            return found or self.ring.answered(sequence)

        self._sleep(sequence, ready)
        chunk = self.ring.next_chunk(sequence)
        require(chunk is not None, f"the reply to {sequence} ends before chunk {part}")
        assert chunk is not None
        require((chunk.start, chunk.positions) == (part * TOKENS, TOKENS), f"{chunk} is not chunk {part} of {sequence}")
        found = self.plane.read(chunk.number)
        require(found == content("reply", self.generation, sequence, part), f"chunk {part} of {sequence} is another's")
        self.ring.consume(chunk.number)
        self.session.ring_teacher()

    def abandon(self, sequence: int) -> None:
        self.ring.abandon(sequence)
        self.session.ring_teacher()

    def _sleep(self, sequence: int, ready: Callable[[], bool | None]) -> None:
        self.waits_for = sequence
        self.session.record.enter(Phase.WAITING)
        if not self.session.wait(ready, time.monotonic() + PATIENCE_S):
            raise DeadlineExceeded(f"the rank hangs in its wait for {sequence}")
        self.session.record.enter(Phase.TRAINING)
        self.waits_for = None


def exchange_afresh(owner: Owner) -> None:
    """A new generation of `owner`'s session works, and nothing of an older one is seen in it."""
    owner.control.ending = False
    token = owner.start_generation()
    teacher = TinyTeacher(TeacherSession(token))
    rank = TinyRank(RankSession(token, 0))
    ring = rank.ring
    cursors = (ring.requested, ring.replied, ring.released, ring.streamed, ring.consumed, ring.abandoned)
    require(not any(cursors), f"the cursors of a new generation begin at {cursors}")
    require(ring.next_request() is None, "a request of an older generation")
    owner.create_replies(OFFER)
    teacher.open()
    rank.open(0.0)
    require(rank.session.lane.segment.words[Header.GENERATION] == token.generation, "an older lane")
    require(rank.plane.read(0) == bytes(NBYTES), "the reply memory of a new generation is not empty")
    sequence = rank.submit()
    while teacher.move():
        if ring.next_chunk(sequence):
            rank.chunk(sequence, ring.consumed)
    rank.take(sequence)
