"""One status record per participant, written by it alone, read by everyone.

A record tells who the participant is, where it is in its loop, and why it failed. The waits, the launcher's progress
line and the reports all read these records and nothing else.
"""

from __future__ import annotations

import enum
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from shmbridge.errors import AttachError, DeadlineExceeded, PeerLost, PlanError
from shmbridge.shm.layout import DECLARED, FAILURE, NO_STEP, OFFER, RECORD_BYTES, Flag, RecordWord, Text, Word
from shmbridge.shm.process import Identity, Peer, myself

_TEXT_WRITES = 2**32  # a text's word is its bytes, plus this for each time that it was written


class Phase(enum.IntEnum):
    """Where a participant is."""

    ABSENT = 0
    STARTING = 1
    LOADING = 2  # teacher: the model
    PROBING = 3  # teacher: a first small forward
    OFFERED = 4  # teacher: waits for the reply memory
    COLLECTING = 5  # teacher: waits for requests
    FORWARD = 6  # teacher: computes
    BARRIER = 7  # rank: waits for the teacher's model
    TRAINING = 8  # rank: outside the bridge
    WAITING = 9  # rank: waits for a reply
    CLOSED = 10
    IDLE = 11  # teacher: loaded, between two generations

    def __str__(self) -> str:
        return self.name.lower()


class Failure(msgspec.Struct, frozen=True):
    """Why the run ends, written by whoever saw it. The earliest record that is not a consequence is the cause."""

    role: str  # launcher, teacher or trainer
    rank: int  # of that role
    pid: int
    phase: str
    step: int | None
    sequence: int | None
    reason: str
    traceback: str = ""
    consequence: bool = False  # a PeerLost: the cause lies elsewhere
    at_ns: int = 0  # CLOCK_MONOTONIC, the same clock in every process of the machine
    status: int = 1  # for the exit code of a launcher that ends with it
    generation: int = 0  # the one that it ends; 0: the session

    def __str__(self) -> str:
        at = "" if self.step is None else f", step {self.step}"
        at += "" if self.sequence is None else f", sequence {self.sequence}"
        return f"{self.role} {self.rank} (pid {self.pid}) in phase {self.phase}{at}: {self.reason}"


class Record:
    """One participant's record, at the beginning of `memory`."""

    ready = Word(RecordWord.READY)  # the generation that a teacher serves; a rank's own, once it has attached
    saves = Flag(RecordWord.SAVES)  # the rank has a hook to save with before it stops
    lost = Flag(RecordWord.LOST)  # no new teacher will come; written by the owner

    def __init__(self, memory: memoryview, role: str, rank: int) -> None:
        self.role = role
        self.rank = rank
        self.memory = memory[:RECORD_BYTES]
        self.words = self.memory.cast("Q")
        self._peer: Peer | None = None

    # Written by the participant

    def sign_in(self) -> None:
        """Make this process the record's participant."""
        pid, start = myself()
        self.reset()
        self.words[RecordWord.HEARTBEAT_NS] = 0
        self.words[RecordWord.START] = start
        self.words[RecordWord.PID] = pid

    def reset(self) -> None:
        """Begin anew: no step, no declared phase, no save hook."""
        self.words[RecordWord.STEP] = self.words[RecordWord.SEQUENCE] = NO_STEP
        self.saves = False
        self.withdraw()
        self.enter(Phase.STARTING)

    def enter(self, phase: Phase) -> None:
        self.words[RecordWord.PHASE] = phase
        self.words[RecordWord.SINCE_NS] = time.monotonic_ns()

    def at(self, step: int | None, sequence: int) -> None:
        self.words[RecordWord.STEP] = NO_STEP if step is None else step
        self.words[RecordWord.SEQUENCE] = sequence

    def progress(self, done: int, total: int) -> None:
        self.words[RecordWord.PROGRESS_TOTAL] = total
        self.words[RecordWord.PROGRESS] = done

    def beat(self) -> None:
        """This process lives. (Where its loop is, the other words tell.)"""
        self.words[RecordWord.HEARTBEAT_NS] = time.monotonic_ns()

    def declare(self, name: str, until_ns: int) -> None:
        """The script says what it does, and until when (CLOCK_MONOTONIC) it is no fault that its loop stands still."""
        self.withdraw()
        self.words[RecordWord.DECLARED_UNTIL_NS] = until_ns
        self._write(DECLARED, name.encode(errors="replace")[: DECLARED.capacity])

    def withdraw(self) -> None:
        """What was declared is over."""
        self._empty(DECLARED)

    @contextmanager
    def declaring(self, name: str, timeout_s: float) -> Iterator[None]:
        """`declare` for a block; what was declared around it holds again after it."""
        outer, until_ns = self.declared, self.words[RecordWord.DECLARED_UNTIL_NS]
        self.declare(name, time.monotonic_ns() + int(timeout_s * 1e9))
        try:
            yield
        finally:
            self.withdraw()
            if outer:
                self.declare(outer[0], until_ns)

    def write_offer(self, offer: bytes) -> None:
        """Raises PlanError where it is larger than its field."""
        if len(offer) > OFFER.capacity:
            raise PlanError(
                f"the teacher's offer takes {len(offer)} bytes, at most {OFFER.capacity} fit: return fewer outputs, or shorten "
                "their names."
            )
        self._write(OFFER, offer)

    def fail(self, reason: str, trace: str = "", *, consequence: bool = False, phase: str = "") -> None:
        """Write this participant's failure; only its first one is kept. `phase`: where it failed, if that is not its phase now."""
        self.relay(
            Failure(
                role=self.role,
                rank=self.rank,
                pid=os.getpid(),
                phase=phase or str(self.phase),
                step=self.step,
                sequence=self.sequence,
                reason=reason,
                traceback=trace,
                consequence=consequence,
                at_ns=time.monotonic_ns(),
            )
        )

    def fail_with(self, error: BaseException) -> None:
        """`fail` for an exception; a PeerLost is marked as a consequence."""
        told = traceback.TracebackException.from_exception(error)
        told.__notes__ = None  # they follow the message, which alone is the reason
        reason = list(told.format_exception_only())[-1].strip()
        trace = "".join(traceback.format_exception(error))
        phase = error.phase if isinstance(error, DeadlineExceeded) else ""  # the wait is over, and it was what failed
        self.fail(reason, trace, consequence=isinstance(error, PeerLost), phase=phase)

    def relay(self, failure: Failure) -> None:
        """Write what this participant learnt of another one that can no longer write; only the first is kept."""
        if not self.words[RecordWord.FAILURE] % _TEXT_WRITES:
            self._write(FAILURE, _fitted(failure))

    def forget_failure(self) -> None:
        """What ended one generation is over with it. (The owner's record alone.)"""
        self._empty(FAILURE)

    def _write(self, field: Text, text: bytes) -> None:
        """Replace a text. Its word tells how often it was written, so that `_read` notices."""
        writes = (self.words[field.word] // _TEXT_WRITES + 1) % _TEXT_WRITES * _TEXT_WRITES
        self.words[field.word] = writes
        self.memory[field.offset : field.offset + len(text)] = text
        self.words[field.word] = writes + len(text)

    def _empty(self, field: Text) -> None:
        self.words[field.word] -= self.words[field.word] % _TEXT_WRITES

    # Written by the owner, about a teacher that is gone

    def clear(self) -> None:
        """Make room for a new process in this participant's place."""
        for word in (RecordWord.PID, RecordWord.READY, RecordWord.PROGRESS, RecordWord.PROGRESS_TOTAL):
            self.words[word] = 0
        self._empty(OFFER)
        self._empty(FAILURE)
        self.enter(Phase.ABSENT)

    # Read by everyone

    @property
    def identity(self) -> Identity | None:
        """None until the participant has signed in."""
        pid = self.words[RecordWord.PID]
        return Identity(pid, self.words[RecordWord.START]) if pid else None

    def is_alive(self) -> bool | None:
        """Whether the participant's process lives; None until it has signed in."""
        who = self.identity
        if who is None:
            return None
        if self._peer is None or self._peer.identity != who:
            self._peer = Peer(who)
        return self._peer.alive()

    @property
    def phase(self) -> Phase:
        value = self.words[RecordWord.PHASE]
        return Phase(value) if value in Phase._value2member_map_ else Phase.ABSENT

    @property
    def seconds_in_phase(self) -> float:
        return (time.monotonic_ns() - self.words[RecordWord.SINCE_NS]) / 1e9

    @property
    def heartbeat_age_s(self) -> float | None:
        """Seconds since the last heartbeat; None before the first."""
        at = self.words[RecordWord.HEARTBEAT_NS]
        return (time.monotonic_ns() - at) / 1e9 if at and self.identity else None

    @property
    def declared(self) -> tuple[str, float] | None:
        """What the script said that it does, and the seconds that it has left (negative: over)."""
        text = self._read(DECLARED)
        if text is None:
            return None
        left_s = (self.words[RecordWord.DECLARED_UNTIL_NS] - time.monotonic_ns()) / 1e9
        return text.decode(errors="replace"), left_s

    @property
    def step(self) -> int | None:
        return self._optional(RecordWord.STEP)

    @property
    def sequence(self) -> int | None:
        return self._optional(RecordWord.SEQUENCE)

    @property
    def progressed(self) -> tuple[int, int]:
        """(done, total); total is 0 while nothing is known."""
        return self.words[RecordWord.PROGRESS], self.words[RecordWord.PROGRESS_TOTAL]

    @property
    def offer(self) -> bytes | None:
        return self._read(OFFER)

    @property
    def failure(self) -> Failure | None:
        text = self._read(FAILURE)
        if text is None:
            return None
        try:
            return msgspec.json.decode(text, type=Failure)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise AttachError(f"the failure record of {self.role} {self.rank} is garbled: {error}.") from None

    def _optional(self, word: int) -> int | None:
        value = self.words[word]
        return None if value == NO_STEP or self.identity is None else value

    def _read(self, field: Text) -> bytes | None:
        """A whole text, or None where there is none: one that is written meanwhile is read again."""
        while nbytes := (state := self.words[field.word]) % _TEXT_WRITES:
            if nbytes > field.capacity:
                raise AttachError(
                    f"the record of {self.role} {self.rank} tells {nbytes} bytes where {field.capacity} fit: garbled."
                )
            text = bytes(self.memory[field.offset : field.offset + nbytes])
            if self.words[field.word] == state:
                return text
        return None


def _fitted(failure: Failure) -> bytes:
    """The failure as JSON that fits its field: the beginning of the reason and the end of the traceback are kept."""
    reason, trace = (part.encode(errors="replace").decode() for part in (failure.reason, failure.traceback))
    trace = trace[-FAILURE.capacity :]
    while True:
        text = msgspec.json.encode(msgspec.structs.replace(failure, reason=reason, traceback=trace))
        if len(text) <= FAILURE.capacity:
            return text
        reason = reason[: max(1000, len(reason) // 2)] if trace else reason[: len(reason) // 2]
        trace = trace[len(trace) // 4 + 1 :]
