"""The requests of one rank that are in flight: their slots, their replies, and who still wants them.

Nothing here checks what a request says (validate does) or holds on to a reply (Lease does). A slot is given back when its
reply was released, or when nobody wants it and the teacher is done with it.
"""

from __future__ import annotations

import os
import re
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, NoReturn, Protocol, TypeVar

import torch

from shmbridge import log
from shmbridge.errors import (
    AttachError,
    Closed,
    DeadlineExceeded,
    PeerLost,
    RequestRefused,
    RingFull,
    TeacherDied,
    TeacherError,
)
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import select
from shmbridge.plane.base import RankPlane
from shmbridge.plane.tensors import DTYPES
from shmbridge.rank import stuck
from shmbridge.rank.device import choose
from shmbridge.rank.on_stop import Stopping
from shmbridge.rank.reply import Reply
from shmbridge.rank.stats import Meter
from shmbridge.rank.validate import CheckedRequest
from shmbridge.shm.process import Identity
from shmbridge.shm.ring import Chunk, ReplyHead
from shmbridge.shm.session import TrainerSession
from shmbridge.shm.status import Phase

T = TypeVar("T")

_GPU_LOOK_S = 0.001
_EXPLAINED = 256  # ended leases and chunks of which an error can tell the sequence
_CHANGED = re.compile(r"is at version \d+; expected version (\d+)")  # autograd, of a saved tensor


class Sent(NamedTuple):
    """A request that was sent, or is `missing`: nobody answers it, because the bridge is off or the teacher is lost."""

    sequence: int
    step: int | None
    extent: Extent
    with_candidates: bool
    missing: bool = False


class SendQueue(Protocol):
    """What Requests needs of a pending.SendQueue."""

    def fill_ring(self) -> None:
        """Send as many requests as the ring has room for."""

    def withdraw(self) -> None:
        """Cancel what was sent and is not waited for; it is sent again later."""


class Requests:
    """Of one rank, from the barrier to its close."""

    def __init__(self, session: TrainerSession, agreed: Offer, device: torch.device | None, stopping: Stopping) -> None:
        """Map the reply memory. Replies are wanted on `device`; None: the current CUDA device where the launcher gave training
        GPUs, else the CPU. Raises AttachError."""
        self.streams = session.control.shape.chunks > 0
        self._queue: weakref.ref[SendQueue] | None = None  # the only one that has requests in the ring
        self._missing = 0  # requests that nobody answers
        self.dropped: list[int] = []  # sequences whose Pending or Reply was dropped; any thread may append
        logged = session.settings.log.stats_every if session.lane.index == 0 else 0
        self.meter = Meter(logged)
        self._open = session
        self.stopping = stopping
        self.teacher_lost = False  # and on_teacher_lost is continue: replies are missing from now on
        self._goes_on = session.settings.on_teacher_lost == "continue"
        self._closed = False
        self._why_closed = ""
        self._process = os.getpid()
        self._outputs = agreed.outputs
        self.device = choose(session, device)
        if session.plane is None:
            session.plane = select.of_rank(session, agreed, self.device)
            session.plane_device = self.device
        elif session.plane_device != self.device:
            raise AttachError(
                f"this process reads its replies on {session.plane_device}, and connects again for {self.device}: a lane has one "
                "device in the life of a process. Give connect(device=...) the same each time."
            )
        self.plane: RankPlane = session.plane
        self.plane.timed |= logged > 0
        self.broken_at: tuple[Identity, int] | None = (
            None  # the teacher and the reply that have left CUDA unusable here
        )
        self._leased: dict[int, Sent] = {}  # their slots are the rank's until `release`
        self._read_chunks: dict[int, Sent] = {}  # the chunk that a loop holds, by its number
        self._ended: deque[tuple[int, Sent]] = deque(maxlen=_EXPLAINED)  # what was lent, with its version at the end
        ring = session.ring
        self._released = ring.released  # sequences below it are given back
        self._released_early: set[int] = set()
        # Nobody reads them, and the teacher is not done with them. At first: what an earlier bridge of this process left.
        self._cancelled = set(range(ring.released, ring.requested))
        self._trace = log.Trace.of("trainer", session.lane.index)

    def close(self, why: str) -> None:
        """What is in flight is no longer read, and leases end. A GPU that still reads a reply gets timeouts.shutdown_s for it, because the
        teacher's memory may go once all ranks have closed. Raises TornReply."""
        if self._closed:
            return
        self._closed = True
        self._why_closed = why
        if os.getpid() != self._process:
            return
        deadline = time.monotonic() + self._open.settings.timeouts.shutdown_s
        while self.plane.waits_for() and not self.broken_at and time.monotonic() < deadline:
            time.sleep(_GPU_LOOK_S)
        for number, sent in (*self._leased.items(), *self._read_chunks.items()):
            self._take_back(number, sent)
        self.plane.check()

    # Sending

    def send(
        self,
        request: CheckedRequest,
        queue: SendQueue | None = None,
        timeout: float | None = None,
        probe: bool = False,
    ) -> Sent:
        """Copy a request of `queue`, or of none, into the ring; what another queue has sent is withdrawn before. Where the oldest
        slot is a cancelled request's, sleep until the teacher is done with that one. Where the teacher is lost and the loop
        goes on without it, nothing is sent and the request is `missing`.

        Raises:
            RingFull: names the requests that hold the slots.
        """
        session = self._session
        if not self.teacher_lost:
            self._turn_to(queue)
            try:
                return self._send(request, timeout, probe)
            except TeacherDied as error:  # while it waited for a cancelled request's slot
                self.go_on_without(error)
        sequence = session.ring.requested + self._missing
        self._missing += 1
        session.record.at(request.step, sequence)
        session.record.enter(Phase.TRAINING)  # the loop moves, though it asks nobody
        return Sent(sequence, request.step, request.extent, False, missing=True)

    def _send(self, request: CheckedRequest, timeout: float | None, probe: bool) -> Sent:
        started = time.monotonic_ns()
        session = self._session
        ring = session.ring
        if self.dropped or self._cancelled:
            self._free_unwanted(wait=True, timeout=timeout)
        if ring.free_slots < 1:
            raise RingFull(self._holders())
        ids, extent, arrays, step = request
        sequence = ring.claim()
        ring.write_request(sequence, step, extent, ids, arrays, probe=probe)
        try:
            ring.publish_request(sequence)
            session.ring_teacher()  # the teacher may take this core now: what a signal handler raises is raised here
            session.record.at(step, sequence)
            sent = Sent(sequence, step, extent, "candidates" in arrays)
            if self._trace:
                self._hand_over("submit", sent, ids.nbytes, started)
        except BaseException:
            self.cancel_since(sequence)  # no Pending will own its slot
            raise
        return sent

    def _turn_to(self, queue: SendQueue | None) -> None:
        """Withdraw what another queue has sent. Slots come free in order, so the slot of a request behind it would stay taken
        until the loop has read everything in front of it."""
        current = self._queue() if self._queue else None
        if current is not queue:
            if current is not None:
                current.withdraw()
            self._queue = weakref.ref(queue) if queue is not None else None

    def has_room(self, queue: SendQueue) -> bool:
        """Whether `queue` can send a request now, once what another one has sent is withdrawn. Does not sleep."""
        if self.teacher_lost:
            return False
        self._turn_to(queue)
        return self.free_slots > 0

    def fill_ring(self) -> None:
        """A reply was read: send the next requests of the queue that sent last."""
        queue = self._queue() if self._queue else None
        if queue is not None and not self._closed and os.getpid() == self._process:
            queue.fill_ring()

    @property
    def next_sequence(self) -> int:
        """Of the request that is sent next."""
        return self._open.ring.requested

    @property
    def free_slots(self) -> int:
        """Requests that could be sent now."""
        ring = self._session.ring
        if self.teacher_lost:
            return ring.depth
        self._free_unwanted(wait=False)
        return ring.free_slots

    # Whole replies

    def answered(self, sent: Sent) -> bool:
        return self._session.ring.answered(sent.sequence) is True

    def wait(self, sent: Sent, timeout: float | None) -> bool:
        """Sleep until the reply is published. False where none will be, and the loop is to go on without."""
        session = self._session
        if self.dropped:
            self._free_unwanted(wait=False)
        if self.streams:
            raise RequestRefused("this session streams its replies; use pending.chunks(), or pending.copy().")
        if session.ring.answered(sent.sequence):
            session.bell.drain()
            return True
        if self.teacher_lost:
            return False
        try:
            self._sleep(lambda: session.ring.answered(sent.sequence), sent.sequence, sent.step, timeout)
        except TeacherDied as error:
            self.go_on_without(error)
            return False
        return True

    def go_on_without(self, error: TeacherDied) -> None:
        """The teacher is lost: replies are missing from now on. Raises `error` unless the loop is to go on."""
        if not self._goes_on:
            raise error
        if not self.teacher_lost:
            log.logger.warning("%s Replies are missing from now on (on_teacher_lost=continue).", error)
        self.teacher_lost = True

    def read(self, sent: Sent) -> Reply:
        """A published reply. Where it raises, the caller cancels the request."""
        started = time.monotonic_ns()
        head = self.head(sent)
        tensors = self._wanted(self._read(sent.sequence, sent.extent), sent)
        if self.plane.keeps:
            self._leased[sent.sequence] = sent
        else:
            self._release_slot(sent.sequence)
        if self._trace:
            self._hand_over("lease", sent, sum(tensor.nbytes for tensor in tensors.values()), started)
        dropped = self.dropped if self.plane.keeps else None
        return Reply(tensors, sent.sequence, sent.step, head.composition, lent=self.plane.lends, dropped=dropped)

    def head(self, sent: Sent) -> ReplyHead:
        """The head of a published reply. Raises TeacherError."""
        head = self._open.ring.read_reply(sent.sequence)
        if head.error is not None:
            at = f"rank {self._open.lane.index}, step {sent.step}, sequence {sent.sequence}"
            raise TeacherError(f"the teacher could not answer {at}.", head.error)
        self.meter.waited(self.plane.stalled_s())
        self.meter.replied(sent.step, head.composition)
        self.last_head = head
        return head

    def as_chunk(self, reply: Reply, sent: Sent) -> Reply:
        """A whole reply in the shape of a chunk: its positions in one axis."""
        names = [spec.name for spec in self._outputs if spec.per_token and spec.name in reply]
        flat = {name: _flat(reply[name], sent.extent) for name in names}
        return Reply(flat, reply.sequence, reply.step, reply.composition, lent=self.plane.lends)

    def release(self, sent: Sent, since_ns: int) -> None:
        """Give a reply's slot back. Raises TornReply."""
        if self._closed or os.getpid() != self._process:
            return
        try:
            self._take_back(sent.sequence, sent)
        finally:
            if self._leased.pop(sent.sequence, None):
                self._release_slot(sent.sequence)
        if self._trace:
            self._hand_over("release", sent, 0, since_ns)

    def _take_back(self, number: int, sent: Sent) -> None:
        """The reply to `sent`, or its chunk `number`, is not to be read any more. Raises TornReply, TeacherDied."""
        if self.broken_at:
            return
        try:
            version = self.plane.release(number)
        except RuntimeError as error:
            self._raise(error, number)
        if version is not None:
            self._ended.append((version, sent))

    def _read(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        """The tensors of a reply, or chunk. Raises TornReply, TeacherDied."""
        try:
            return self.plane.read(number, extent)
        except RuntimeError as error:
            self._raise(error, number)

    def _raise(self, error: RuntimeError, number: int) -> NoReturn:
        died = self.blame(error, number)
        if died is None:
            raise error
        raise died from error

    def blame(self, error: BaseException, number: int | None = None) -> TeacherDied | None:
        """What to raise in place of an error of CUDA that the death of a teacher explains: see stuck.dead_teacher. None: another
        error."""
        gone = stuck.dead_teacher(self._open, error, self.plane.teachers())
        if gone is None:
            return None
        last = self._released if number is None else number
        self.broken_at = gone, last
        said = (str(error).splitlines() or [""])[0]
        return TeacherDied(
            f"rank {self._open.lane.index}, reply {last}: the GPU reports {said!r}, and the teacher (pid {gone.pid}) whose "
            "memory it was reading is gone. CUDA can no longer be used in this process, which ends: start again from the last "
            "checkpoint."
        )

    def explain(self, error: BaseException) -> None:
        """Add a note to autograd's error about a saved tensor that was lent and whose lease has ended."""
        found = _CHANGED.search(str(error)) if isinstance(error, RuntimeError) else None
        if found is None:
            return
        sent = next((sent for version, sent in reversed(self._ended) if version == int(found[1])), None)
        if sent is not None:
            error.add_note(
                f"This backward needs the reply to step {sent.step}, sequence {sent.sequence}, whose lease or chunk has ended: "
                "the teacher writes its memory again. Finish the backward inside the block of `with pending.wait() as reply:` or "
                "inside the loop over pending.chunks(), or use pending.copy()."
            )

    # Streamed replies

    def begin(self, sent: Sent, timeout: float | None) -> bool:
        """Sleep until the first chunk is there. False where no reply will come, and the loop is to go on without. Raises
        RequestRefused unless it is its turn."""
        self._free_unwanted(wait=False)
        first = self._first_unread()
        if sent.sequence != first:
            raise RequestRefused(
                f"sequence {first} is to be read before sequence {sent.sequence}: replies are streamed in the order of their "
                "requests. Read or cancel it first."
            )
        try:
            self._await_chunk(sent, timeout)
        except TeacherDied as error:
            self.go_on_without(error)
            return False
        return True

    def chunks(self, sent: Sent, timeout: float | None) -> Iterator[tuple[slice, Reply]]:
        """The chunks of a streamed reply; what is not read of them is cancelled."""
        taken = 0
        ring = self._session.ring
        try:
            while taken < sent.extent.positions:
                try:
                    chunk = self._next_chunk(sent, taken, timeout)
                except TeacherDied as error:
                    self.go_on_without(error)
                    yield slice(taken, sent.extent.positions), Reply({}, sent.sequence, sent.step, None)
                    return
                extent = Extent(0, 0, chunk.positions)
                tensors = self._wanted(self._read(chunk.number, extent), sent)
                reply = Reply(tensors, sent.sequence, sent.step, None, lent=self.plane.lends)
                self._read_chunks[chunk.number] = sent
                if not self.plane.keeps:
                    self._consume(chunk)
                try:
                    yield slice(chunk.start, chunk.start + chunk.positions), reply
                finally:
                    reply.forget()
                    if self._read_chunks.pop(chunk.number, None) and not self._closed:
                        self._take_back(chunk.number, sent)
                    if self.plane.keeps:
                        self._consume(chunk)
                taken += chunk.positions
            try:
                self._sleep(lambda: ring.answered(sent.sequence), sent.sequence, sent.step, timeout)
                self.head(sent)
            except TeacherDied as error:  # with every chunk read
                self.go_on_without(error)
        finally:
            self.cancel(sent.sequence)

    def _next_chunk(self, sent: Sent, taken: int, timeout: float | None) -> Chunk:
        """Sleep until there is one, which begins at position `taken`. Raises TeacherError where there will be none."""
        self._await_chunk(sent, timeout)
        chunk = self._open.ring.next_chunk(sent.sequence)
        if chunk is None:  # answered, and no chunk was published before that
            self.head(sent)
            raise AttachError(f"the reply to sequence {sent.sequence} ends before its last chunk: refused.")
        most = min(self._open.control.shape.chunk_positions, sent.extent.positions - taken)
        if chunk.start != taken or not 0 < chunk.positions <= most:
            raise AttachError(
                f"chunk {chunk.number} of sequence {sent.sequence} tells {chunk.positions} positions from {chunk.start} on, "
                f"expected 1 to {most} from {taken} on: refused."
            )
        return chunk

    def _await_chunk(self, sent: Sent, timeout: float | None) -> None:
        ring = self._session.ring

        def ready() -> bool | None:
            before = ring.consumed
            found = ring.next_chunk(sent.sequence) is not None or ring.answered(sent.sequence)
            if ring.consumed != before:  # chunks of a cancelled reply: there is room again
                self._open.ring_teacher()
            return found

        if not ready():
            self._sleep(ready, sent.sequence, sent.step, timeout)

    def _consume(self, chunk: Chunk) -> None:
        if os.getpid() == self._process and not self._closed:  # not a forked child's copy of the loop
            self._open.ring.consume(chunk.number)
            self._open.ring_teacher()

    def assemble(self, sent: Sent, chunks: Iterable[tuple[slice, Reply]]) -> Reply:
        """A streamed reply in tensors of the caller's own, shaped as a whole one."""
        empty = {
            spec.name: torch.empty(spec.dims(sent.extent), dtype=DTYPES[spec.dtype], device=self.device)
            for spec in self._outputs
        }
        tensors = self._wanted(empty, sent)
        for rows, chunk in chunks:
            if chunk.missing:
                return chunk
            for name, tensor in tensors.items():
                _flat(tensor, sent.extent)[rows] = chunk[name]
        return Reply(tensors, sent.sequence, sent.step, None if self.teacher_lost else self.last_head.composition)

    @staticmethod
    def _wanted(tensors: dict[str, torch.Tensor], sent: Sent) -> dict[str, torch.Tensor]:
        """Without what the payload has and this request did not ask for."""
        if not sent.with_candidates:
            tensors.pop("candidate_logprobs", None)
        return tensors

    # Giving back

    def cancel(self, sequence: int) -> None:
        """Nobody will read the reply to `sequence`, or what is left of it. Does nothing where its slot was given back."""
        if os.getpid() == self._process and not self._closed:
            self.dropped.append(sequence)
            self._free_unwanted(wait=False)

    def cancel_since(self, sequence: int) -> None:
        """Cancel `sequence` and what was sent after it."""
        for sent in range(max(sequence, self._released), self._open.ring.requested):
            self.cancel(sent)

    def _free_unwanted(self, wait: bool, timeout: float | None = None) -> None:
        """Give back what was dropped: the slot of a reply at once; of a request that nobody reads, once the teacher, which is
        told, is done with it. Raises TornReply.

        With `wait`, a ring whose oldest slot is one of them and that is full is waited for: only the teacher can free it."""
        session = self._session
        ring = session.ring
        while self.dropped:
            sequence = self.dropped[0]  # removed once it is done: a KeyboardInterrupt comes anywhere
            if sequence in self._leased:
                self.release(self._leased[sequence], time.monotonic_ns())
            elif sequence >= self._released and sequence not in self._released_early:
                self._cancelled.add(sequence)
            del self.dropped[0]
        if not self._cancelled:
            return
        first = self._first_unread()
        if first > ring.abandoned:
            ring.abandon(first - 1)
            session.ring_teacher()
        if wait and ring.free_slots < 1 and self._released in self._cancelled:
            oldest = self._released
            self._sleep(lambda: ring.answered(oldest), oldest, None, timeout)
        for sequence in sorted(self._cancelled):
            if ring.answered(sequence):
                self._release_slot(sequence)
                self._cancelled.discard(sequence)

    def _first_unread(self) -> int:
        """The oldest sequence whose reply somebody may still read."""
        sequence = self._released
        while sequence in self._cancelled or sequence in self._released_early:
            sequence += 1
        return sequence

    def _release_slot(self, sequence: int) -> None:
        """Leases may end in any order; the cursor follows the oldest that is still held."""
        if os.getpid() != self._process:
            return  # a forked child's copy of a lease
        if sequence >= self._released:
            self._released_early.add(sequence)
        while self._released in self._released_early:
            self._open.ring.release(self._released)
            self._released += 1
            self._released_early.discard(self._released - 1)

    def _holders(self) -> str:
        """The message of RingFull: which requests hold slots and why, and how many that hold none wait behind them."""
        ring = self._open.ring
        held: dict[str, list[str]] = {"Leased": [], "Answered and not read": [], "Being computed": []}
        waiting: dict[str, int] = {}  # by the last holder in front of them
        holder = ""
        for sequence in range(self._released, ring.requested):
            if sequence in self._released_early or sequence in self._cancelled:
                waiting[holder] = waiting.get(holder, 0) + 1
                continue
            holder = f"sequence {sequence}"
            step = ring.read_request(sequence).step
            why = "Leased" if sequence in self._leased else "Answered and not read"
            holding = held[why if ring.answered(sequence) else "Being computed"]
            holding.append(f"{holder} ({'no step' if step is None else f'step {step}'})")
        told = [f"{ring.depth} requests are in flight and the ring has ring.depth={ring.depth} slots."]
        told += [f"{why}: {', '.join(holding)}." for why, holding in held.items() if holding]
        if waiting:
            behind = ", ".join(f"{count} behind {holder}" for holder, count in waiting.items())
            told.append(f"Released or cancelled, and waiting because slots come free in order: {behind}.")
        told.append(
            f"Read and release sequence {self._released}, or cancel it, before you submit again; or raise ring.depth."
        )
        return " ".join(told)

    # Waiting

    def _sleep(self, ready: Callable[[], T | None], sequence: int, step: int | None, timeout: float | None) -> T:
        """The project's one wait, in the words of a request."""
        session = self._session
        limit = session.settings.timeouts.request_s if timeout is None else timeout
        session.record.enter(Phase.WAITING)
        started = time.monotonic()
        try:
            found = session.wait(ready, started + limit)
        except PeerLost as error:
            if not (self._goes_on and isinstance(error, TeacherDied)):
                self.stopping.save()
            at = f"rank {session.lane.index} waited for the reply to step {step}, sequence {sequence}"
            raise type(error)(f"{at}: {error}") from None
        finally:
            self.meter.waited(time.monotonic() - started)
            session.record.enter(Phase.TRAINING)
        if found is None:
            raise DeadlineExceeded(self._late(sequence, step, limit)).within(str(Phase.WAITING))
        return found

    def _late(self, sequence: int, step: int | None, limit: float) -> str:
        teacher, settings = self._open.teacher, self._open.settings
        hint = "Raise timeouts.request_s if it is only slow."
        if teacher.phase is Phase.COLLECTING and settings.teacher.collect == "lockstep":
            hint = "teacher.collect is lockstep: it waits for a request of every rank."
        return (
            f"no reply to step {step}, sequence {sequence} after {limit:g} s; the teacher is in phase "
            f"{teacher.phase} for {teacher.seconds_in_phase:.1f} s. {hint}"
        )

    @property
    def _session(self) -> TrainerSession:
        if self._closed:
            raise Closed(self._why_closed)
        if os.getpid() != self._process:
            raise Closed(f"the bridge belongs to pid {self._process}; a forked child cannot use it.")
        return self._open

    def _hand_over(self, event: str, sent: Sent, nbytes: int, since_ns: int) -> None:
        assert self._trace
        self._trace.hand_over(
            event,
            lane=self._open.lane.index,
            step=sent.step,
            sequence=sent.sequence,
            slot=sent.sequence % self._open.ring.depth,
            shape=(sent.extent.batch, sent.extent.seq),
            nbytes=nbytes,
            since_ns=since_ns,
        )


def _flat(tensor: torch.Tensor, extent: Extent) -> torch.Tensor:
    """The axes (batch, seq) of a tensor as one."""
    return tensor.flatten(0, 1) if extent.chosen is None else tensor
