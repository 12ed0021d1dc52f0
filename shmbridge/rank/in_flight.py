"""The requests of one rank: which wait to be sent, which are in the ring, and which replies somebody still wants.

A request takes a slot of the ring when it is sent. Its slot is free again when its reply was released, or when nobody wants the
reply and the teacher is done with it. Slots come free in the order of sequences: one that is free early waits for the older ones.

Nobody answers where the bridge is off, or where the teacher is lost and the loop goes on without it (on_teacher_lost: continue).
Requests are then `missing`: they take no slot, and their replies have no tensors.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import filterfalse

import torch

from shmbridge import log
from shmbridge.errors import RequestRefused, RingFull, TeacherDied, TeacherError
from shmbridge.output_spec import Offer
from shmbridge.rank.device import Watchdog
from shmbridge.rank.lifecycle import Lifecycle
from shmbridge.rank.reply import Lent, Replies, Reply
from shmbridge.rank.request import CheckedRequest
from shmbridge.rank.stats import Meter
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.record import Phase
from shmbridge.shm.ring import ReplyHead

UNSENT = -1  # the sequence of a request that is not in the ring


class Request:
    """One request: waits in a queue, is in the ring, was withdrawn from it and waits again, or is `missing`."""

    __slots__ = ("__weakref__", "checked", "extent", "missing", "queue", "sequence", "step", "with_candidates")

    def __init__(self, checked: CheckedRequest, queue: SendQueue | None = None) -> None:
        self.checked: CheckedRequest | None = checked  # what is sent; None once it is not sent again
        self.queue = queue  # until it is waited for or cancelled
        self.sequence = UNSENT
        self.step = checked.step
        self.extent = checked.extent
        self.with_candidates = "candidates" in checked.arrays
        self.missing = False  # there will be no reply

    def wanted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`tensors` without what the payload has and this request did not ask for."""
        if not self.with_candidates:
            tensors.pop("candidate_logprobs", None)
        return tensors

    def missing_reply(self) -> Reply:
        """A reply without tensors."""
        return Reply({}, self.sequence, self.step, None)


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
        self._leased: dict[int, Request] = {}  # their slots are the rank's until `release`
        if session is not None:
            self._session = session
            self._ring = session.ring
            self._released = session.ring.released  # sequences below it are given back
            self._released_early: set[int] = set()
            self._owners: dict[
                int, weakref.ref[Request | Reply]
            ] = {}  # who wants the reply to a sequence: see `_wanted`
            self._trace = log.Trace.of("trainer", session.lane.index)

    def open(self, agreed: Offer, device: torch.device | None) -> None:
        """Map the reply memory, once the teacher is ready: see Replies."""
        self.replies = Replies(self._session, agreed, device, self.watchdog)
        self.replies.plane.timed |= self.meter.logs

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
            try:
                self.free_unwanted(wait=True, timeout=timeout)
            except TeacherDied as error:
                self.go_on_without(error)
        if self.nobody_answers:
            request.sequence, request.missing, request.queue = self.next_sequence, True, None
            self._missing += 1
            if self.life.enabled:
                self._session.record.at(request.step, request.sequence)
                self._session.record.enter(Phase.TRAINING)  # the loop moves, though it asks nobody
            return
        if self._ring.free_slots < 1:
            raise RingFull(self._holders())
        started = time.monotonic_ns()
        checked = request.checked
        assert checked is not None, "it is sent once, or waits in its queue"
        sequence = self._ring.claim()
        self._ring.write_request(sequence, checked.step, checked.extent, checked.ids, checked.arrays, probe=probe)
        try:
            request.sequence = sequence
            self._owners[sequence] = weakref.ref(request)
            self._ring.publish_request(sequence)
            self._session.ring_teacher()  # the teacher may take this core now: what a signal handler raises is raised here
            self._session.record.at(request.step, sequence)
            if self._trace:
                self._hand_over("submit", request, checked.ids.nbytes, started)
        except BaseException:
            request.sequence = UNSENT
            self.cancel(sequence)
            raise
        if request.queue is None:
            request.checked = None  # its buffers may be the caller's

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
        self.free_unwanted(wait=False)
        return self._ring.free_slots

    # Replies

    def wait(self, request: Request, timeout: float | None) -> bool:
        """Sleep until the reply is published. False where there will be none: `request` is missing."""
        if request.missing:
            return False
        session = self.life.session
        if self.streams:
            raise RequestRefused("this session streams its replies; use pending.chunks(), or pending.copy().")
        if self._ring.answered(request.sequence):
            session.bell.drain()
            return True
        self.free_unwanted(wait=False)  # what nobody wants is not computed before it
        return self.await_reply(lambda: self._ring.answered(request.sequence), request, timeout)

    def await_reply(self, ready: Callable[[], bool | None], request: Request, timeout: float | None) -> bool:
        """Sleep until `ready` of the reply, or of its next chunk. False where nobody answers: `request` is missing then."""
        if not self.nobody_answers:
            try:
                self._sleep(ready, request.sequence, request.step, timeout)
                return True
            except TeacherDied as error:
                self.go_on_without(error)
        request.missing = not ready()
        return not request.missing

    def go_on_without(self, error: TeacherDied) -> None:
        """The teacher is lost: nobody answers from now on. Raises `error` unless the loop is to go on."""
        if self._session.settings.on_teacher_lost != "continue":
            raise error
        if not self.nobody_answers:
            log.logger.warning("%s Replies are missing from now on (on_teacher_lost=continue).", error)
        self.nobody_answers = True

    def read(self, request: Request) -> Reply:
        """A published reply. Where it raises, the caller cancels the request. Raises TeacherError, TornReply, TeacherDied."""
        started = time.monotonic_ns()
        head = self.head(request)
        sequence, plane = request.sequence, self.replies.plane
        tensors = request.wanted(self.replies.read(sequence, request.extent, Lent(sequence, request.step)))
        reply = Reply(tensors, sequence, request.step, head.composition, lent=plane.lends)
        if plane.keeps:
            self._leased[sequence] = request
            self._owners[sequence] = weakref.ref(reply)
        else:
            self._release_slot(sequence)
        if self._trace:
            self._hand_over("lease", request, sum(tensor.nbytes for tensor in tensors.values()), started)
        return reply

    def head(self, request: Request) -> ReplyHead:
        """The head of a published reply. Raises TeacherError."""
        rank, step, sequence = self._session.lane.index, request.step, request.sequence
        head = self._ring.read_reply(sequence)
        if head.error is not None:
            raise TeacherError(
                f"the teacher could not answer rank {rank}, step {step}, sequence {sequence}.", head.error
            )
        self.meter.waited(self.replies.plane.stalled_s())
        self.meter.replied(step, head.composition)
        self.last_head = head
        return head

    # Giving back

    def release(self, request: Request, since_ns: int) -> None:
        """End a lease and give its slot back. Raises TornReply."""
        if not self.life.usable:
            return
        try:
            self.replies.take_back(request.sequence)
        finally:
            if self._leased.pop(request.sequence, None):
                self._release_slot(request.sequence)
        if self._trace:
            self._hand_over("release", request, 0, since_ns)

    def cancel(self, sequence: int) -> None:
        """Nobody will read the reply to `sequence`, or what is left of it. Does nothing where its slot was given back."""
        if self.life.usable:
            self._owners.pop(sequence, None)
            self.free_unwanted(wait=False)

    def cancel_since(self, sequence: int) -> None:
        """Cancel `sequence` and what was sent after it."""
        if self.life.enabled:
            for sent in range(max(sequence, self._released), self._ring.requested):
                self.cancel(sent)

    def free_unwanted(self, wait: bool, timeout: float | None = None) -> None:
        """Give back what nobody wants: the slot of a reply at once, that of a request once the teacher is done with it. With `wait`,
        sleep for the oldest slot of a full ring where it is such a request's: only the teacher can free it. Raises TornReply."""
        ring = self._ring
        unwanted = list(filterfalse(self._wanted, range(self._released, ring.requested)))
        if not unwanted:
            return
        for sequence in unwanted:
            if sequence in self._leased:
                self.release(self._leased[sequence], time.monotonic_ns())
        first = self.first_wanted()
        if first > ring.abandoned:
            ring.abandon(first - 1)
            self._session.ring_teacher()
        oldest = self._released
        if wait and ring.free_slots < 1 and oldest in unwanted:
            self._sleep(lambda: ring.answered(oldest), oldest, None, timeout)
        for sequence in unwanted:
            if ring.answered(sequence):  # also of a slot that was given back before: a KeyboardInterrupt comes anywhere
                self._release_slot(sequence)

    def _wanted(self, sequence: int) -> bool:
        """Whether somebody may still read the reply to `sequence`: its Pending or, once it is leased, its Reply is referred to, and
        it was not cancelled or withdrawn. Nothing is done when they are dropped, which may be in any thread."""
        known = self._owners.get(sequence)
        owner = known() if known else None
        return owner is not None and owner.sequence == sequence

    def first_wanted(self) -> int:
        """The oldest sequence whose reply somebody may still read; where there is none, the next one."""
        requested = self._ring.requested
        return next(filter(self._wanted, range(self._released, requested)), requested)

    def _release_slot(self, sequence: int) -> None:
        """Leases may end in any order; the cursor follows the oldest that is still held."""
        self._owners.pop(sequence, None)
        if sequence >= self._released:
            self._released_early.add(sequence)
        while self._released in self._released_early:
            self._ring.release(self._released)
            self._released += 1
            self._released_early.discard(self._released - 1)

    def _holders(self) -> str:
        """The message of RingFull: which requests hold slots and why, and how many that hold none wait behind them."""
        ring = self._ring
        held: dict[str, list[str]] = {"Leased": [], "Answered and not read": [], "Being computed": []}
        waiting: Counter[str] = Counter()  # by the last holder in front of them
        holder = ""
        for sequence in range(self._released, ring.requested):
            if not self._wanted(sequence):
                waiting[holder] += 1
                continue
            holder, step = f"sequence {sequence}", ring.read_request(sequence).step
            unread = "Answered and not read" if ring.answered(sequence) else "Being computed"
            held["Leased" if sequence in self._leased else unread].append(
                f"{holder} ({'no step' if step is None else f'step {step}'})"
            )
        told = [f"{ring.depth} requests are in flight and the ring has ring.depth={ring.depth} slots."]
        told += [f"{why}: {', '.join(holding)}." for why, holding in held.items() if holding]
        if waiting:
            behind = ", ".join(f"{count} behind {holder}" for holder, count in waiting.items())
            told.append(f"Released or cancelled, and waiting because slots come free in order: {behind}.")
        told.append(
            f"Read and release sequence {self._released}, or cancel it, before you submit again; or raise ring.depth."
        )
        return " ".join(told)

    def _sleep(self, ready: Callable[[], object], sequence: int, step: int | None, timeout: float | None) -> None:
        started = time.monotonic()
        try:
            self.life.wait(ready, sequence, step, timeout)
        finally:
            self.meter.waited(time.monotonic() - started)

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


class SendQueue:
    """The requests of a prefetch that nobody waited for yet, in order; the ring has as many of the first as it has room for.

    Each Request is referred to weakly: its Pending keeps it, and one whose Pending is dropped is neither sent nor kept.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._all: list[weakref.ref[Request]] = []

    def add(self, checked: CheckedRequest) -> Request:
        """A request behind all others, which is not sent yet. Its buffers are copied: the caller may change its tensors."""
        request = Request(checked.copied(), self)
        self._all.append(weakref.ref(request))
        return request

    def fill_ring(self) -> None:
        """Send as many requests as the ring has room for. Does not sleep. Raises Closed where there are any."""
        for request in self._waiting():
            if request.sequence == UNSENT:
                self._requests.take_turn(self)
                if not self._requests.free_slots:
                    return
                self._requests.send(request)

    def send(self, request: Request, timeout: float | None) -> None:
        """Send `request`, after what is in front of it. It leaves the queue: it is waited for, and not withdrawn any more. Raises
        what Requests.send raises."""
        self._requests.life.heed()
        waiting = self._waiting()
        place = waiting.index(request)
        try:
            for each in waiting[: place + 1]:
                if each.sequence == UNSENT:
                    self._requests.send(each, timeout)
        except RingFull as full:
            if not place:
                raise
            raise RingFull(
                f"{full} Before this batch its prefetch handed out others that are not read: {place}. Requests are sent in the "
                "order of their batches: read them in that order, or cancel them."
            ) from None
        request.queue = request.checked = None
        self.fill_ring()

    def withdraw(self) -> None:
        """Nobody wants the replies to what was sent: it is sent again later."""
        for request in self._waiting():
            request.sequence = UNSENT

    def _waiting(self) -> list[Request]:
        """The requests that nobody waited for, cancelled or dropped."""
        waiting = [request for known in self._all if (request := known()) is not None and request.queue is self]
        self._all = [weakref.ref(request) for request in waiting]
        return waiting
