"""The trainer's side: submit, wait, lease.

    bridge = shmbridge.connect()
    bridge.wait_ready()
    pending = bridge.submit(input_ids)          # returns at once
    with pending.wait() as reply:               # a lease on the teacher's output
        loss = kd_loss(student_logits, reply.logits)
        loss.backward()
    reply = bridge.exchange(input_ids)          # the simple way: tensors of one's own
    for batch, pending in bridge.prefetch(loader):
        ...                                     # the teacher is ahead of the loop
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar, Unpack

import torch

from shmbridge import parity, shared_head, trace
from shmbridge.board import Phase
from shmbridge.config import Config
from shmbridge.errors import AttachError, Closed, DeadlineExceeded, PeerLost, RequestRefused, TeacherError
from shmbridge.head import Head
from shmbridge.host_plane import HostPlane
from shmbridge.offer import Extent, Offer
from shmbridge.payload import DTYPES
from shmbridge.prefetch import Prefetch, Tokens
from shmbridge.reply import Lease, Pending, Reply
from shmbridge.ring import Chunk, ReplyHead
from shmbridge.session import TrainerSession
from shmbridge.stats import Meter, Stats
from shmbridge.token_ids import Extras, IntArray, check_arrays, check_ids

__all__ = ["Bridge", "Lease", "Pending", "Reply"]

T = TypeVar("T")


class Bridge:
    """One rank's connection to the teacher. Made by `connect`."""

    enabled = True

    def __init__(self, session: TrainerSession, device: torch.device | None = None) -> None:
        self._open = session
        self._closed = False
        self._process = os.getpid()
        self._device = device
        self._offer: Offer | None = None
        self._head: Head | None = None
        self._streams = session.control.shape.chunks > 0
        self._released = 0  # sequences below it are given back
        self._released_early: set[int] = set()
        self._dropped: list[int] = []  # sequences whose Pending was dropped
        self._cancelled: set[int] = set()  # nobody reads them, and the teacher is not done with them
        self._meter = Meter(session.settings.log.stats_every if session.lane.index == 0 else 0)
        self._trace = trace.Trace.of("trainer", session.lane.index)

    @property
    def rank(self) -> int:
        """This rank's lane: its LOCAL_RANK, unless connect was told otherwise."""
        return self._session.lane.index

    @property
    def settings(self) -> Config:
        """The run's resolved config."""
        return self._session.settings

    @property
    def teacher(self) -> Offer:
        """What the teacher offers: outputs, vocab_size, and the path of its tokenizer. Waits for the teacher."""
        self.wait_ready()
        return self._ready()

    @property
    def head(self) -> Head:
        """The teacher's output head, on this rank's device: head(reply.hidden) are its logits. Waits for the teacher.

        On the CPU its weight (words, width) is shared with the other ranks and not to be written.

        Raises:
            RequestRefused: the payload is not hidden.
        """
        agreed = self._ready()
        if agreed.head is None:
            raise RequestRefused("the teacher shares its head only with the payload hidden; set payload.hidden={}.")
        if self._head is None:
            self._head = shared_head.attach(self._session.token, agreed.head, self._target())
        return self._head

    def wait_ready(
        self,
        timeout: float | None = None,
        *,
        vocab_size: int | None = None,
        tokenizer: Any = None,
        loss: Callable[[torch.Tensor, Reply], torch.Tensor] | None = None,
    ) -> None:
        """The startup barrier: sleep until the teacher's model is loaded, then check that what comes over the bridge equals
        what the model gives in its own process (`parity` of the config). Rank 0 logs the result in one line.

        Args:
            timeout: seconds. None: timeouts.startup_s of the config.
            vocab_size: the last axis of the student's logits, to be compared with the teacher's.
            tokenizer: the student's, to be compared with the teacher's.
            loss: the loss of the training loop, as loss(student_logits, reply); it must be 0 where the student's logits are
                the teacher's own.

        Raises:
            ParityError: names the check that failed.
            TeacherDied: it failed while loading; carries its traceback.
            DeadlineExceeded: it is still loading; says how far it is.
        """
        session = self._session
        first = self._offer is None
        if first:
            agreed = session.wait_ready(session.settings.timeouts.startup_s if timeout is None else timeout)
            self._plane = HostPlane(session.token, session.control.shape, session.lane.index, agreed)
            self._offer = agreed
        student = parity.Student(vocab_size, tokenizer, loss)
        if first or any(part is not None for part in student):
            passed = parity.check(self, self._ready(), student)
            if passed and self.rank == 0:
                trace.logger.info("parity check passed: %s", passed)
            self._meter.reset()

    def submit(
        self,
        input_ids: torch.Tensor | IntArray,
        attention_mask: torch.Tensor | IntArray | None = None,
        **extras: Unpack[Extras],
    ) -> Pending:
        """Hand a batch to the teacher and return at once. The first call waits for the teacher's model.

        All tensors are on the CPU, strided or not, and copied before the call returns.

        Args:
            input_ids: (batch, seq) int32 or int64.
            attention_mask: (batch, seq) of 0 and 1, or None where every token counts.
            positions: (batch, seq) of 0 and 1: outputs come back, and the teacher's head is computed, for these alone.
            position_ids: (batch, seq) int32 or int64; they start again at each packed document.
            targets: (batch, seq) int32 or int64, with the payload logprobs: the words whose log-probability comes back, -100
                for none. None: the next token of each row, and none after its last.
            candidates: (batch, seq, c) int32 or int64, with payload.logprobs.candidates = c: words whose log-probabilities
                come back as `candidate_logprobs`.
            step: the training loop's own counter, for logs and reports; never a key.

        Raises:
            RequestRefused (a ValueError): shape, dtype, device or an ID that the teacher cannot take; nothing was sent.
            RingFull: ring.depth requests are in flight.
            Closed, TeacherDied, DeadlineExceeded: see `wait_ready`.
        """
        session, agreed = self._session, self._ready()
        ids = check_ids(input_ids, agreed, session.control.shape)
        extent, arrays = check_arrays(ids, attention_mask, extras, agreed, session.control.shape)
        step = extras.get("step")
        if step is not None and step < 0:
            raise RequestRefused(f"step is {step}; expected a counter that is not negative, or None.")
        return self._send(ids, extent, arrays, step)

    def _send(
        self, ids: IntArray, extent: Extent, arrays: dict[str, memoryview], step: int | None, probe: bool = False
    ) -> Pending:
        started = time.monotonic_ns()
        session = self._open
        ring = session.ring
        if self._dropped or self._cancelled:
            self._free_cancelled()
        sequence = ring.claim()
        ring.write_request(sequence, step, extent, ids.data.cast("B"), arrays, probe=probe)
        ring.publish_request(sequence)
        session.teacher_bell.ring()
        session.record.at(step, sequence)
        if self._trace:
            self._hand_over("submit", sequence, step, (extent.batch, extent.seq), ids.nbytes, started)
        return Pending(self, sequence, step, extent, frozenset(arrays))

    def _probe(self, ids: IntArray, extent: Extent, arrays: dict[str, memoryview]) -> tuple[Reply, int]:
        """A request of the parity check: the reply, and the CRC-32 of the IDs as the teacher read them."""
        pending = self._send(ids, extent, arrays, None, probe=True)
        reply = pending.copy(self._open.settings.timeouts.startup_s)
        return reply, self._last_head.echo

    def exchange(
        self,
        input_ids: torch.Tensor | IntArray,
        attention_mask: torch.Tensor | IntArray | None = None,
        *,
        timeout: float | None = None,
        **extras: Unpack[Extras],
    ) -> Reply:
        """submit and copy in one call: a reply of owned tensors. Raises what both raise."""
        return self.submit(input_ids, attention_mask, **extras).copy(timeout)

    def prefetch(
        self,
        batches: Iterable[T],
        tokens: Tokens[T] = None,
        *,
        ahead: int | None = None,
        state: Callable[[], Any] | None = None,
    ) -> Prefetch[T]:
        """Iterate over (batch, pending) with the teacher ahead of the loop: the next batches are submitted before this one
        is handed out.

        Batches are handed out in their order, each exactly once, and unchanged. At the end, on an exception of `batches`
        and on a `break`, nothing is lost and nothing stays in flight: see shmbridge.prefetch.

        Args:
            batches: a loader, or any iterable or iterator.
            tokens: where a batch has its token IDs: a key; a function to input_ids (batch, seq), or to a dict of what `submit`
                takes. None: the batch itself, or its "input_ids" with "attention_mask" and "position_ids" where they are there.
            ahead: batches that are submitted before their turn; fewer while the ring has no room. None: ring.depth - 1.
            state: called after each batch is taken from `batches`, such as loader.state_dict; what it gave for the batch of
                the loop is the iterator's `state`, so that a checkpoint resumes exactly.
        """
        depth = self.settings.ring.depth if self.enabled else 1
        return Prefetch(self, batches, tokens, depth - 1 if ahead is None else ahead, state)

    def stats(self) -> Stats:
        """What this rank's replies took so far, since `wait_ready`."""
        return self._meter.total()

    @property
    def free_slots(self) -> int:
        """Requests that could be submitted now."""
        self._free_cancelled(wait=False)
        ring = self._session.ring
        return ring.depth - (ring.requested - ring.released)

    def close(self) -> None:
        """No request follows; the teacher and the other ranks go on. Once is enough; more does nothing."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._process:  # a forked child, such as a DataLoader worker, is not the rank
            self._open.close()

    def __enter__(self) -> Bridge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(error)
        self.close()

    # Used by Pending and Lease

    def _answered(self, sequence: int) -> bool:
        return self._session.ring.answered(sequence) is True

    def _await(self, pending: Pending, timeout: float | None) -> None:
        """Sleep until the reply is published."""
        session, sequence = self._session, pending.sequence
        if self._streams:
            raise RequestRefused("this session streams its replies; use pending.chunks(), or pending.copy().")
        if session.ring.answered(sequence):
            session.bell.drain()
            return
        self._sleep(lambda: session.ring.answered(sequence), sequence, pending.step, timeout)

    def _sleep(self, ready: Callable[[], T | None], sequence: int, step: int | None, timeout: float | None) -> T:
        """The project's one wait, in the words of a request."""
        session = self._session
        limit = session.settings.timeouts.request_s if timeout is None else timeout
        session.record.enter(Phase.WAITING)
        started = time.monotonic()
        try:
            found = session.wait(ready, started + limit)
        except PeerLost as error:
            at = f"rank {self.rank} waited for the reply to step {step}, sequence {sequence}"
            raise type(error)(f"{at}: {error}") from None
        self._meter.waited(time.monotonic() - started)
        session.record.enter(Phase.TRAINING)
        if found is None:
            raise DeadlineExceeded(self._late(sequence, step, limit))
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

    def _lease(self, pending: Pending) -> Lease:
        """A lease on a published reply; the slot is given back where there is none to be had."""
        started = time.monotonic_ns()
        sequence = pending.sequence
        try:
            head = self._read_head(pending)
            tensors = self._plane.read(sequence, pending._extent, self._target())
        except BaseException:
            self._release_slot(sequence)
            raise
        self._leave_out(tensors, pending)
        if self._trace:
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            self._hand_over("lease", sequence, pending.step, (pending._extent.batch, pending._extent.seq), nbytes, started)
        return Lease(self, Reply(tensors, sequence, pending.step, head.composition))

    def _read_head(self, pending: Pending) -> ReplyHead:
        """The head of a published reply. Raises TeacherError."""
        head = self._open.ring.read_reply(pending.sequence)
        if head.error is not None:
            at = f"rank {self.rank}, step {pending.step}, sequence {pending.sequence}"
            raise TeacherError(f"the teacher could not answer {at}.", head.error)
        self._meter.replied(pending.step, head.composition)
        self._last_head = head
        return head

    def _check_turn(self, pending: Pending) -> None:
        """Streamed replies come one after the other."""
        self._free_cancelled(wait=False)
        first = self._first_unread()
        if self._streams and pending.sequence != first:
            raise RequestRefused(
                f"sequence {first} is to be read before sequence {pending.sequence}: replies are streamed in the order "
                "of their requests. Read or cancel it first."
            )

    def _chunks(self, pending: Pending, timeout: float | None) -> Iterator[tuple[slice, Reply]]:
        if self._streams:
            yield from self._streamed(pending, timeout)
            return
        self._await(pending, timeout)
        with self._lease(pending) as reply:
            per_token = [spec.name for spec in self._ready().outputs if spec.per_token and spec.name in reply]
            flat = {name: _flat(reply[name], pending._extent) for name in per_token}
            yield slice(0, pending._extent.positions), Reply(flat, reply.sequence, reply.step, reply.composition)

    def _streamed(self, pending: Pending, timeout: float | None) -> Iterator[tuple[slice, Reply]]:
        """The chunks of a reply; what is not read of them is cancelled."""
        sequence, taken = pending.sequence, 0
        ring = self._open.ring
        try:
            while taken < pending._extent.positions:
                chunk = self._await_chunk(pending, timeout)
                tensors = self._plane.read(chunk.number, Extent(0, 0, chunk.positions), self._target())
                self._leave_out(tensors, pending)
                reply = Reply(tensors, sequence, pending.step, None)
                try:
                    yield slice(chunk.start, chunk.start + chunk.positions), reply
                finally:
                    reply._forget()
                    if os.getpid() == self._process:  # not a forked child's copy of the loop
                        ring.consume(chunk.number, self._open.reader)
                        self._open.teacher_bell.ring()
                taken += chunk.positions
            self._sleep(lambda: ring.answered(sequence), sequence, pending.step, timeout)
            self._read_head(pending)
        finally:
            self._cancel(sequence)

    def _await_chunk(self, pending: Pending, timeout: float | None) -> Chunk:
        """The next chunk of a reply. Raises TeacherError where there will be none."""
        ring, reader = self._open.ring, self._open.reader

        def ready() -> Chunk | bool | None:
            return ring.next_chunk(pending.sequence, reader) or ring.answered(pending.sequence)

        found = ready() or self._sleep(ready, pending.sequence, pending.step, timeout)
        if isinstance(found, Chunk):
            return found
        found = ring.next_chunk(pending.sequence, reader)  # the last one is published before the reply is
        if found is not None:
            return found
        self._read_head(pending)
        raise AttachError(f"the reply to sequence {pending.sequence} ends before its last chunk: refused.")

    def _assemble(self, pending: Pending, timeout: float | None) -> Reply:
        """A streamed reply in tensors of one's own, shaped as a whole one."""
        extent = pending._extent
        tensors = {
            spec.name: torch.empty(spec.dims(extent), dtype=DTYPES[spec.dtype], device=self._target())
            for spec in self._ready().outputs
        }
        self._leave_out(tensors, pending)
        for rows, chunk in pending.chunks(timeout):
            for name, tensor in tensors.items():
                _flat(tensor, extent)[rows] = chunk[name]
        return Reply(tensors, pending.sequence, pending.step, self._last_head.composition)

    @staticmethod
    def _leave_out(tensors: dict[str, torch.Tensor], pending: Pending) -> None:
        """What the payload has and this request did not ask for."""
        if "candidates" not in pending._arrays:
            tensors.pop("candidate_logprobs", None)

    def _release(self, reply: Reply, since_ns: int) -> None:
        self._release_slot(reply.sequence)
        if self._trace:
            self._hand_over("release", reply.sequence, reply.step, (), 0, since_ns)

    def _cancel(self, sequence: int) -> None:
        """Nobody will read the reply to `sequence`, or what is left of it."""
        if os.getpid() != self._process or self._closed:
            return
        self._cancelled.add(sequence)
        self._free_cancelled(wait=False)

    def _free_cancelled(self, wait: bool = True) -> None:
        """Tell the teacher what nobody reads, and give back the slots of which it is done with.

        With `wait`, a ring that is full of them alone is waited for: only the teacher can free it."""
        session, ring = self._session, self._open.ring
        dropped, self._dropped = self._dropped, []
        self._cancelled.update(dropped)
        if not self._cancelled:
            return
        first = self._first_unread()
        if first > ring.abandoned:
            ring.abandon(first - 1, session.reader)
            session.teacher_bell.ring()
        if wait and ring.requested - ring.released >= ring.depth and self._released in self._cancelled:
            oldest = self._released
            self._sleep(lambda: ring.answered(oldest), oldest, None, None)
        for sequence in sorted(self._cancelled):
            if ring.answered(sequence):
                self._cancelled.remove(sequence)
                self._release_slot(sequence)

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
        if sequence != self._released:
            self._released_early.add(sequence)
            return
        self._released += 1
        while self._released in self._released_early:
            self._released_early.remove(self._released)
            self._released += 1
        self._open.ring.release(self._released - 1, self._open.reader)

    # Within

    @property
    def _session(self) -> TrainerSession:
        if self._closed:
            raise Closed("the bridge is closed.")
        if os.getpid() != self._process:
            raise Closed(f"the bridge belongs to pid {self._process}; a forked child cannot use it.")
        return self._open

    def _ready(self) -> Offer:
        if self._offer is None:
            self.wait_ready()
            assert self._offer
        return self._offer

    def _target(self) -> torch.device:
        if self._device is None:
            on_gpu = bool(self._open.settings.train.gpus) and torch.cuda.is_available()
            self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return self._device

    def _fail(self, error: BaseException) -> None:
        """Tell the session that this rank ends by an exception. A clean SystemExit is a close."""
        clean_exit = isinstance(error, SystemExit) and error.code in (None, 0)
        if not self._closed and not clean_exit and os.getpid() == self._process:
            self._open.record.fail_with(error)

    def _hand_over(
        self, event: str, sequence: int, step: int | None, shape: tuple[int, ...], nbytes: int, since_ns: int
    ) -> None:
        assert self._trace
        self._trace.hand_over(
            event,
            lane=self.rank,
            step=step,
            sequence=sequence,
            slot=sequence % self._open.ring.depth,
            shape=shape,
            nbytes=nbytes,
            since_ns=since_ns,
        )


def _flat(tensor: torch.Tensor, extent: Extent) -> torch.Tensor:
    """The axes (batch, seq) of a tensor as one."""
    return tensor.flatten(0, 1) if extent.chosen is None else tensor
