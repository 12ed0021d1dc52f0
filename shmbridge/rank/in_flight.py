"""The requests of one rank that are in the ring: sent, waited for, and given back.

A request takes a slot of the ring when it is sent. Its slot is free again when its reply was released, or when nobody wants the
reply and the teacher is done with it. Slots come free in the order of sequences: one that is free early waits for the older ones.
None of this is stored. A slot is free where nobody refers to its owner (the Pending's Request or, once it is leased, the Reply)
and its reply is published.

Nobody answers where the bridge is off, or where the teacher is lost and the loop goes on without it (on_teacher_lost: continue).
Requests are then `missing`: they take no slot, and their replies have no tensors.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from shmbridge import log
from shmbridge.errors import DeadlineExceeded, PeerLost, RingFull, TeacherDied
from shmbridge.output_spec import Offer
from shmbridge.rank.device import Watchdog
from shmbridge.rank.lifecycle import Lifecycle
from shmbridge.rank.reply import Replies, Reply
from shmbridge.rank.request import UNSENT, Request
from shmbridge.rank.stats import Meter
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.rank_session import RankSession

if TYPE_CHECKING:
    from shmbridge.rank.prefetch import SendQueue


class Requests:
    """The requests of one bridge, from connect to close."""

    def __init__(self, life: Lifecycle, session: RankSession | None) -> None:
        """Without a session the bridge is off: nobody answers."""
        self.life = life
        self.watchdog = Watchdog(session)
        self.nobody_answers = session is None
        self.streams = session is not None and session.control.shape.chunks > 0
        self.meter = Meter(session.settings.log.stats_every if session and session.lane.index == 0 else 0)
        self._queue: weakref.ref[SendQueue] | None = None  # the only one that has requests in the ring
        self._missing = 0  # requests that were counted and not sent
        self._owners: dict[int, weakref.ref[Request | Reply]] = {}  # by sequence: who wants the reply
        if session is not None:
            self._session = session
            self._ring = session.ring
            self._trace = log.Trace.of("trainer", session.lane.index)

    def open(self, offer: Offer, device: torch.device | None) -> None:
        """Map the reply memory, once the teacher is ready: see Replies."""
        self.replies = Replies(self._session, offer, device, self.watchdog, self.meter)

    # Sending

    def send(self, request: Request, timeout: float | None = None, *, probe: bool = False) -> None:
        """Copy `request` into the ring; what another queue than its own has sent is withdrawn before. Where the oldest slot is a
        cancelled request's, sleep until the teacher is done with that one. Where nobody answers, `request` is missing.

        Raises:
            RingFull: names the requests that hold the slots.
            Closed, DeadlineExceeded, PeerLost
        """
        self.life.check()
        self.take_turn(request.queue)
        if not self.nobody_answers:
            self.reclaim()
            if self._ring.free_slots < 1 and not self._wanted(
                oldest := self._ring.released
            ):  # only the teacher frees it
                try:
                    self._sleep(lambda: self._ring.answered(oldest), oldest, None, timeout)
                    self.reclaim()
                except TeacherDied as error:
                    self.go_on_without(error)
        if self.nobody_answers:
            request.sequence, request.missing, request.queue = self.next_sequence, True, None
            self._missing += 1
            if self.life.enabled:
                self._session.record.at(request.step, request.sequence)
                self._session.record.enter(Phase.TRAINING)  # the loop moves, though it asks nobody
            return
        started = time.monotonic_ns()
        try:
            sequence = self._ring.claim()
        except RingFull:
            raise RingFull(self._holders()) from None
        self._ring.write_request(sequence, request.step, request.extent, request.ids, request.arrays, probe=probe)
        try:
            request.sequence = sequence
            self._owners[sequence] = weakref.ref(request)
            self._ring.publish_request(sequence)
            self._session.ring_teacher()  # the teacher may take this core now: what a signal handler raises is raised here
            self._session.record.at(request.step, sequence)
            if self._trace:
                self._hand_over("submit", request, request.ids.nbytes, started)
        except BaseException:
            request.sequence = UNSENT
            self.cancel(sequence)
            raise
        if request.queue is None:
            request.drop_buffers()  # they may be the caller's

    def take_turn(self, queue: SendQueue | None) -> None:
        """Withdraw what another queue has sent. Slots come free in order, so the slot of a request behind it would stay taken
        until the loop has read everything in front of it."""
        current = self._queue() if self._queue else None
        if current is not queue:
            if current is not None:
                current.withdraw()
            self._queue = weakref.ref(queue) if queue is not None else None

    def fill_ring(self) -> None:
        """A reply was read: send the next requests of the queue that sent last."""
        queue = self._queue() if self._queue else None
        if queue is not None and self.life.usable:
            queue.fill_ring()

    @property
    def next_sequence(self) -> int:
        """The sequence of the request that is sent next."""
        return self._missing + (self._ring.requested if self.life.enabled else 0)

    @property
    def free_slots(self) -> int:
        """Requests that could be sent now. Raises Closed."""
        self.life.check()
        if self.nobody_answers:
            return self._ring.depth if self.life.enabled else 1
        self.reclaim()
        return self._ring.free_slots

    def _holders(self) -> str:
        """The message of RingFull: what each slot is taken by."""
        ring, held = self._ring, []
        for sequence in range(ring.released, ring.requested):
            state = "answered and not read" if ring.answered(sequence) else "being computed"
            if not self._wanted(sequence):
                state = "waits for the slots before it"
            elif not self.streams and sequence in self.replies.lent:
                state = "leased"
            step = ring.read_request(sequence).step
            held.append(f"sequence {sequence} ({'no step' if step is None else f'step {step}'}) {state}")
        return (
            f"{ring.depth} requests are in flight and the ring has ring.depth={ring.depth} slots: {', '.join(held)}. Slots come "
            f"free in order: read and release sequence {ring.released}, or cancel it, before you submit again; or raise ring.depth."
        )

    # Waiting

    def wait(self, request: Request, timeout: float | None) -> bool:
        """Sleep until the reply, or the next chunk of it, is published. False where there will be none: `request` is missing.
        Raises what `_sleep` raises."""
        session, ring = self.life.session, self._ring

        def ready() -> bool | None:
            if not self.streams:
                return ring.answered(request.sequence)
            before = ring.consumed
            found = ring.next_chunk(request.sequence) is not None or ring.answered(request.sequence)
            if ring.consumed != before:  # chunks of a cancelled reply: there is room again
                session.ring_teacher()
            return found

        if ready():
            session.bell.drain()
            return True
        self.reclaim()  # what nobody wants is not computed before it
        if not self.nobody_answers:
            try:
                self._sleep(ready, request.sequence, request.step, timeout)
                return True
            except TeacherDied as error:
                self.go_on_without(error)
        request.missing = not ready()
        return not request.missing

    def _sleep(self, ready: Callable[[], object], sequence: int, step: int | None, timeout: float | None) -> None:
        """Sleep until `ready` gives something other than None. Where another process was lost, the save hook is called first.

        Args:
            timeout: seconds. None: timeouts.request_s of the config.

        Raises:
            DeadlineExceeded, PeerLost: they name the request.
        """
        session, settings = self.life.session, self._session.settings
        limit = settings.timeouts.request_s if timeout is None else timeout
        started = time.monotonic()
        session.record.enter(Phase.WAITING)
        try:
            found = session.wait(ready, started + limit)
        except PeerLost as error:
            if not (settings.on_teacher_lost == "continue" and isinstance(error, TeacherDied)):
                self.life.save()
            at = f"rank {session.lane.index} waited for the reply to step {step}, sequence {sequence}"
            raise type(error)(f"{at}: {error}") from None
        finally:
            session.record.enter(Phase.TRAINING)
            self.meter.waited(time.monotonic() - started)
        if found is not None:
            return
        teacher = session.teacher
        hint = "Raise timeouts.request_s if it is only slow."
        if teacher.phase is Phase.COLLECTING and settings.teacher.collect == "lockstep":
            hint = "teacher.collect is lockstep: it waits for a request of every rank."
        raise DeadlineExceeded(
            f"no reply to step {step}, sequence {sequence} after {limit:g} s; the teacher is in phase "
            f"{teacher.phase} for {teacher.seconds_in_phase:.1f} s. {hint}"
        ).within(str(Phase.WAITING))

    def go_on_without(self, error: TeacherDied) -> None:
        """The teacher is lost: nobody answers from now on. Raises `error` unless the loop is to go on."""
        if self._session.settings.on_teacher_lost != "continue":
            raise error
        if not self.nobody_answers:
            log.logger.warning("%s Replies are missing from now on (on_teacher_lost=continue).", error)
        self.nobody_answers = True

    # Reading and giving back

    def read(self, request: Request) -> Reply:
        """A published reply. Where it raises, the caller cancels the request. Raises TeacherError, TornReply, TeacherDied."""
        started = time.monotonic_ns()
        reply = self.replies.read(request)
        if self.replies.plane.keeps:
            self._owners[request.sequence] = weakref.ref(reply)
        else:
            self.cancel(request.sequence)  # its slot is free
        if self._trace:
            self._hand_over("lease", request, sum(reply[name].nbytes for name in reply.names), started)
        return reply

    def release(self, request: Request, since_ns: int) -> None:
        """End a lease and give its slot back. Raises TornReply."""
        if not self.life.usable:
            return
        self._owners.pop(request.sequence, None)
        try:
            self.replies.take_back(request.sequence)
        finally:
            self.reclaim()
        if self._trace:
            self._hand_over("release", request, 0, since_ns)

    def cancel(self, sequence: int) -> None:
        """Nobody will read the reply to `sequence`, or what is left of it. Does nothing where its slot was given back."""
        if self.life.usable:
            self._owners.pop(sequence, None)
            self.reclaim()

    def cancel_since(self, sequence: int) -> None:
        """Cancel `sequence` and what was sent after it."""
        for sent in [each for each in self._owners if each >= sequence]:
            self.cancel(sent)

    def reclaim(self) -> None:
        """Give back what nobody wants: the slot of a reply at once, that of a request once the teacher is done with it, which is
        told that it need not compute it. Raises TornReply."""
        ring = self._ring
        first = ring.released  # the oldest that somebody wants
        unwanted = [sequence for sequence in range(first, ring.requested) if not self._wanted(sequence)]
        if not unwanted:
            return
        for sequence in unwanted:
            if sequence == first:
                first += 1
            if not self.streams and (dropped := self.replies.lent.get(sequence)):  # a lease that was not released
                self.release(dropped, time.monotonic_ns())
        oldest = ring.released
        while oldest < first and ring.answered(oldest):
            self._owners.pop(oldest, None)
            ring.release(oldest)
            oldest += 1
        if oldest < first and first > ring.abandoned:
            ring.abandon(first - 1)
            self._session.ring_teacher()

    def first_wanted(self) -> int:
        """The oldest sequence whose reply somebody may still read; where there is none, the next one."""
        requested = self._ring.requested
        return next(filter(self._wanted, range(self._ring.released, requested)), requested)

    def _wanted(self, sequence: int) -> bool:
        """Whether somebody may still read the reply to `sequence`: its Pending or, once it is leased, its Reply is referred to, and
        it was not cancelled or withdrawn. Nothing is done when they are dropped, which may be in any thread."""
        known = self._owners.get(sequence)
        owner = known() if known else None
        return owner is not None and owner.sequence == sequence

    def _hand_over(self, event: str, request: Request, nbytes: int, since_ns: int) -> None:
        assert self._trace
        self._trace.hand_over(
            event,
            lane=self._session.lane.index,
            step=request.step,
            sequence=request.sequence,
            slot=request.sequence % self._ring.depth,
            shape=(request.extent.batch, request.extent.seq),
            nbytes=nbytes,
            since_ns=since_ns,
        )
