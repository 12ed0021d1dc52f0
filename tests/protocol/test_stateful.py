"""Any order of calls over real shared memory and real doorbells, beside a model in plain Python that says what must come."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmbridge.errors import AttachError, RingFull
from shmbridge.shm import owner
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from tests.protocol import actors
from tests.protocol.actors import (
    CHUNKS_OF_A_REPLY,
    FAILS,
    NBYTES,
    OFFER,
    TOKENS,
    TinyRank,
    TinyTeacher,
    Witness,
    content,
)

DEPTH = 2


class Expected:
    """One lane of one generation as it should be."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.fails: list[bool] = []  # of each request
        self.answers: list[str] = []  # of each answered request: reply, error or skipped
        self.given_back: set[int] = set()
        self.released = self.abandoned = 0
        self.sent: int | None = None  # chunks of the reply that is being streamed
        self.stream: list[tuple[int, int]] = []  # (sequence, part) of each chunk
        self.consumed = 0
        self.closed = False

    @property
    def requested(self) -> int:
        return len(self.fails)

    @property
    def replied(self) -> int:
        return len(self.answers)

    @property
    def full(self) -> bool:
        return self.requested - self.released >= DEPTH

    @property
    def held(self) -> list[int]:
        """Answered, and not given back."""
        return [sequence for sequence in range(self.released, self.replied) if sequence not in self.given_back]

    def move(self) -> bool:
        """The teacher's next move. False where there is none."""
        sequence = self.replied
        if sequence == self.requested:
            return False
        unread = self.abandoned > sequence
        if self.sent is not None:
            if self.sent == CHUNKS_OF_A_REPLY or unread or self.closed:
                self.sent = None
                self.answers.append("reply")
            elif len(self.stream) - self.consumed < self.chunks:
                self.stream.append((sequence, self.sent))
                self.sent += 1
            else:
                return False
        elif unread:
            self.answers.append("skipped")
        elif self.fails[sequence]:
            self.answers.append("error")
        elif self.chunks:
            self.sent = 0
        else:
            self.answers.append("reply")
        return True

    def next_chunk(self, sequence: int) -> tuple[int, int] | None:
        """(number, part) of the oldest chunk of `sequence`; those of earlier ones are given back."""
        while self.consumed < len(self.stream):
            found, part = self.stream[self.consumed]
            if found >= sequence:
                return (self.consumed, part) if found == sequence else None
            self.consumed += 1
        return None

    def give_back(self, sequence: int) -> None:
        self.given_back.add(sequence)
        while self.released in self.given_back:
            self.released += 1


class Machine(RuleBasedStateMachine):
    """Both sides and the owner in one process. Of whole replies, or with CHUNKS of streamed ones."""

    CHUNKS = 0

    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner(actors.settings(DEPTH, self.CHUNKS), 1)
        self.begin()

    @rule()
    def begin(self) -> None:
        """A new generation; what was in flight is lost with the old one."""
        token = self.owner.start_generation()
        self.teacher = TinyTeacher(TeacherSession(token))
        self.rank = TinyRank(RankSession(token, 0))
        self.owner.create_replies(OFFER)
        self.teacher.open()
        self.rank.open(0.0)
        self.expected = Expected(self.CHUNKS)
        self.witness = Witness(self.owner.lanes[0].ring)
        self.reading = 0  # the oldest sequence whose reply is not read to its end

    @precondition(lambda self: not self.expected.closed)
    @rule(fails=strategies.booleans())
    def submit(self, fails: bool) -> None:
        if self.expected.full:
            with pytest.raises(RingFull):
                self.rank.submit()
        else:
            assert self.rank.submit(FAILS if fails else None) == self.expected.requested
            self.expected.fails.append(fails)

    @rule()
    def answer(self) -> None:
        assert self.teacher.move() == self.expected.move()

    @rule()
    def answer_all(self) -> None:
        while self.expected.move():
            assert self.teacher.move()
        assert not self.teacher.move()

    @precondition(lambda self: self.expected.replied > self.expected.released and not self.expected.closed)
    @rule()
    def wait(self) -> None:
        """Of what is answered; the rank was rung."""
        self.rank.wait(self.expected.replied - 1)

    @precondition(lambda self: self.expected.held)
    @rule(data=strategies.data())
    def release(self, data: strategies.DataObject) -> None:
        """In any order; the cursor follows the oldest that is held, as requests.py has it."""
        before = self.expected.released
        self.expected.give_back(data.draw(strategies.sampled_from(self.expected.held)))
        if self.expected.released > before:
            self.rank.ring.release(self.expected.released - 1)

    @precondition(lambda self: self.expected.requested > self.expected.abandoned and not self.expected.closed)
    @rule(data=strategies.data())
    def abandon(self, data: strategies.DataObject) -> None:
        last = data.draw(strategies.integers(self.expected.abandoned, self.expected.requested - 1))
        self.rank.abandon(last)
        self.expected.abandoned = last + 1

    @precondition(lambda self: self.CHUNKS and self.reading < self.expected.requested)
    @rule(consume=strategies.booleans())
    def read_chunk(self, consume: bool) -> None:
        """The next of the oldest reply that somebody reads."""
        expected, ring = self.expected, self.rank.ring
        sequence = self.reading = max(self.reading, expected.abandoned)
        if sequence >= expected.requested:
            return
        chunk, due = ring.next_chunk(sequence), expected.next_chunk(sequence)
        if due is None:
            assert chunk is None
            if sequence < expected.replied:
                self.reading += 1
            return
        number, part = due
        assert chunk == (number, part * TOKENS, TOKENS)
        assert self.rank.plane.read(number) == content("reply", self.rank.generation, sequence, part)
        if consume:
            ring.consume(number)
            expected.consumed += 1

    @rule()
    def close(self) -> None:
        self.rank.close()
        self.expected.closed = True

    @invariant()
    def cursors_are_as_expected(self) -> None:
        ring, expected = self.owner.lanes[0].ring, self.expected
        self.witness.look()
        assert (ring.requested, ring.replied, ring.released) == (
            expected.requested,
            expected.replied,
            expected.released,
        )
        assert (ring.streamed, ring.consumed) == (len(expected.stream), expected.consumed)
        assert (ring.abandoned, ring.closed) == (expected.abandoned, expected.closed)

    @invariant()
    def what_is_held_stays_as_it_was_answered(self) -> None:
        for sequence in self.expected.held:
            answer = self.expected.answers[sequence]
            if answer == "skipped":
                with pytest.raises(AttachError, match="status 3"):
                    self.rank.ring.read_reply(sequence)
            else:
                self.rank.read(sequence, error=answer == "error")
        for sequence in (self.expected.replied, self.expected.requested):
            assert not self.rank.ring.answered(sequence)

    @invariant()
    def chunks_that_are_not_given_back_stay(self) -> None:
        for number in range(self.expected.consumed, len(self.expected.stream)):
            sequence, part = self.expected.stream[number]
            assert self.rank.plane.read(number) == content("reply", self.rank.generation, sequence, part)

    @invariant()
    def nothing_lies_in_a_new_ring(self) -> None:
        if not self.expected.requested:
            assert self.rank.plane.read(0) == bytes(NBYTES)

    def teardown(self) -> None:
        self.owner.close()
        assert self.owner.session_id not in owner.objects()


class Streamed(Machine):
    """Replies come in chunks."""

    CHUNKS = 2


FEW = settings(max_examples=40, stateful_step_count=40, deadline=None, derandomize=True)
TestWhole = Machine.TestCase
TestWhole.settings = FEW
TestStreamed = Streamed.TestCase
TestStreamed.settings = FEW
