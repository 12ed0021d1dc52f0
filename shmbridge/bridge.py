"""The trainer's side: submit, wait, lease.

    bridge = shmbridge.connect()
    bridge.wait_ready()
    pending = bridge.submit(input_ids)          # returns at once
    with pending.wait() as reply:               # a lease on the teacher's output
        loss = kd_loss(student_logits, reply.logits)
        loss.backward()
    reply = bridge.exchange(input_ids)          # the simple way: tensors of one's own

References run one way, lease -> pending -> bridge, so that a loop which runs with the garbage collector off holds neither
a slot nor a mapping longer than its own variables do.
"""

from __future__ import annotations

import os
import time
from types import TracebackType

import torch

from shmbridge import trace
from shmbridge.board import Phase
from shmbridge.config import Config
from shmbridge.errors import (
    Closed,
    DeadlineExceeded,
    PeerLost,
    RequestRefused,
    TeacherError,
)
from shmbridge.host_plane import HostPlane
from shmbridge.offer import Offer
from shmbridge.ring import Composition
from shmbridge.session import TrainerSession
from shmbridge.token_ids import IntArray, check_ids, check_mask


class Reply:
    """What the teacher answered: named tensors with a leading batch axis, (batch, seq, vocab) for `logits`.

    `missing` is True where there is no answer because the bridge is off; there are no tensors then. `composition` tells
    where the request stood in the teacher's forward, which the bits of the reply depend on.
    """

    __slots__ = ("_released", "_tensors", "composition", "missing", "sequence", "step")

    def __init__(
        self, tensors: dict[str, torch.Tensor], sequence: int, step: int | None, composition: Composition | None
    ) -> None:
        self._tensors = tensors
        self._released = False
        self.missing = not tensors
        self.sequence = sequence
        self.step = step
        self.composition = composition

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def logits(self) -> torch.Tensor:
        """(batch, seq, vocab); row i is the distribution after token i."""
        return self["logits"]

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._released:
            raise Closed(f"the lease on sequence {self.sequence} was released; use the reply inside its `with` block.")
        if name not in self._tensors:
            has = "no tensors, because the bridge is off" if self.missing else ", ".join(self._tensors)
            raise KeyError(f"the reply has no {name!r}; it has {has}")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def _owned(self) -> Reply:
        """The same reply outside of any lease. On a GPU the tensors are this rank's own already."""
        owned = {name: t.clone() if t.device.type == "cpu" else t for name, t in self._tensors.items()}
        return Reply(owned, self.sequence, self.step, self.composition)

    def _forget(self) -> None:
        self._tensors = {}
        self._released = True


class Lease:
    """The right to read one reply in place. Used as `with pending.wait() as reply:`; released at the end of the block.

    The tensors lie in memory that the teacher writes again after the release: finish the backward inside the block.
    """

    __slots__ = ("_bridge", "_since_ns", "reply")

    def __init__(self, bridge: Bridge | None, reply: Reply) -> None:
        self._bridge = bridge
        self._since_ns = time.monotonic_ns()
        self.reply = reply

    def release(self) -> None:
        """Give the slot back. Once is enough; more does nothing."""
        if self._bridge is not None:
            bridge, self._bridge = self._bridge, None
            self.reply._forget()
            bridge._release(self.reply, self._since_ns)

    def __enter__(self) -> Reply:
        return self.reply

    def __exit__(self, *_: object) -> None:
        self.release()


class Pending:
    """A request that was submitted and not yet answered."""

    __slots__ = ("_batch", "_bridge", "_seq", "sequence", "step")

    def __init__(self, bridge: Bridge, sequence: int, step: int | None, batch: int, seq: int) -> None:
        self._bridge: Bridge | None = bridge
        self.sequence = sequence
        self.step = step
        self._batch = batch
        self._seq = seq

    @property
    def done(self) -> bool:
        """True once `wait` would not have to."""
        return self._bridge is None or self._bridge._answered(self.sequence)

    def wait(self, timeout: float | None = None) -> Lease:
        """Sleep until the teacher has answered; a lease on the reply.

        Args:
            timeout: seconds. None: timeouts.request_s of the config.

        Raises:
            TeacherError: the forward raised for this request; the slot is free again and the teacher lives.
            TeacherDied, TrainerDied, LauncherDied: somebody else ended; names the step and the sequence.
            DeadlineExceeded: nobody died and nobody answered. `wait` may be called again.
            Closed: this Pending was waited for before, or its bridge is closed.
        """
        if self._bridge is None:
            raise Closed(f"sequence {self.sequence} was waited for before; a reply is leased once.")
        bridge = self._bridge
        bridge._await(self, timeout)
        self._bridge = None  # from here on the slot is the lease's, or given back
        return bridge._lease(self.sequence, self.step, self._batch, self._seq)

    def __del__(self) -> None:
        """Dropped without a lease: the slot is free again once the teacher has answered."""
        if self._bridge is not None:
            self._bridge._dropped.append(self.sequence)

    def copy(self, timeout: float | None = None) -> Reply:
        """`wait`, and copy the reply out of its slot: tensors of one's own, no lease. Raises what `wait` raises."""
        with self.wait(timeout) as reply:
            return reply._owned()


class Bridge:
    """One rank's connection to the teacher. Made by `connect`."""

    enabled = True

    def __init__(self, session: TrainerSession, device: torch.device | None = None) -> None:
        self._open = session
        self._closed = False
        self._process = os.getpid()
        self._device = device
        self._offer: Offer | None = None
        self._released = 0
        self._released_early: set[int] = set()
        self._dropped: list[int] = []  # sequences whose Pending was dropped
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

    def wait_ready(self, timeout: float | None = None) -> None:
        """The startup barrier: sleep until the teacher's model is loaded.

        Args:
            timeout: seconds. None: timeouts.startup_s of the config.

        Raises:
            TeacherDied: it failed while loading; carries its traceback.
            DeadlineExceeded: it is still loading; says how far it is.
        """
        session = self._session
        if self._offer is None:
            agreed = session.wait_ready(session.settings.timeouts.startup_s if timeout is None else timeout)
            self._plane = HostPlane(session.token, session.control.shape, session.lane.index, agreed)
            self._offer = agreed

    def submit(
        self,
        input_ids: torch.Tensor | IntArray,
        attention_mask: torch.Tensor | IntArray | None = None,
        *,
        step: int | None = None,
    ) -> Pending:
        """Hand a batch to the teacher and return at once. The first call waits for the teacher's model.

        Args:
            input_ids: (batch, seq) int32 or int64 on the CPU, strided or not; copied before the call returns.
            attention_mask: (batch, seq) of 0 and 1 on the CPU, or None where every token counts.
            step: the training loop's own counter, for logs and reports; never a key.

        Raises:
            RequestRefused (a ValueError): shape, dtype, device or an ID that the teacher cannot take; nothing was sent.
            RingFull: ring.depth requests are in flight.
            Closed, TeacherDied, DeadlineExceeded: see `wait_ready`.
        """
        started = time.monotonic_ns()
        session, agreed = self._session, self._ready()
        ids = check_ids(input_ids, agreed, session.control.shape)
        mask = None if attention_mask is None else check_mask(attention_mask, ids)
        if step is not None and step < 0:
            raise RequestRefused(f"step is {step}; expected a counter that is not negative, or None.")
        batch, seq = ids.shape
        ring = session.ring
        if self._dropped:
            self._release_dropped()
        sequence = ring.claim()
        ring.write_request(
            sequence, step, batch, seq, ids.data.cast("B"), None if mask is None else mask.data.cast("B")
        )
        ring.publish_request(sequence)
        session.teacher_bell.ring()
        session.record.at(step, sequence)
        if self._trace:
            self._hand_over("submit", sequence, step, (batch, seq), ids.nbytes, started)
        return Pending(self, sequence, step, batch, seq)

    def exchange(
        self,
        input_ids: torch.Tensor | IntArray,
        attention_mask: torch.Tensor | IntArray | None = None,
        *,
        step: int | None = None,
        timeout: float | None = None,
    ) -> Reply:
        """submit and copy in one call: a reply of owned tensors. Raises what both raise."""
        return self.submit(input_ids, attention_mask, step=step).copy(timeout)

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
        ring = session.ring
        if ring.answered(sequence):
            session.bell.drain()
            return
        limit = session.settings.timeouts.request_s if timeout is None else timeout
        session.record.enter(Phase.WAITING)
        try:
            answered = session.wait(lambda: ring.answered(sequence), time.monotonic() + limit)
        except PeerLost as error:
            at = f"rank {self.rank} waited for the reply to step {pending.step}, sequence {sequence}"
            raise type(error)(f"{at}: {error}") from None
        session.record.enter(Phase.TRAINING)
        if not answered:
            raise DeadlineExceeded(self._late(pending, limit))

    def _late(self, pending: Pending, limit: float) -> str:
        teacher, settings = self._open.teacher, self._open.settings
        hint = "Raise timeouts.request_s if it is only slow."
        if teacher.phase is Phase.COLLECTING and settings.teacher.collect == "lockstep":
            hint = "teacher.collect is lockstep: it waits for a request of every rank."
        return (
            f"no reply to step {pending.step}, sequence {pending.sequence} after {limit:g} s; the teacher is in phase "
            f"{teacher.phase} for {teacher.seconds_in_phase:.1f} s. {hint}"
        )

    def _lease(self, sequence: int, step: int | None, batch: int, seq: int) -> Lease:
        """A lease on a published reply; the slot is given back where there is none to be had."""
        started = time.monotonic_ns()
        try:
            head = self._open.ring.read_reply(sequence)
            if head.error is not None:
                at = f"rank {self.rank}, step {step}, sequence {sequence}"
                raise TeacherError(f"the teacher could not answer {at}.", head.error)
            tensors = self._plane.read(sequence, batch, seq, self._target())
        except BaseException:
            self._release_slot(sequence)
            raise
        if self._trace:
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            self._hand_over("lease", sequence, step, (batch, seq), nbytes, started)
        return Lease(self, Reply(tensors, sequence, step, head.composition))

    def _release(self, reply: Reply, since_ns: int) -> None:
        self._release_slot(reply.sequence)
        if self._trace:
            self._hand_over("release", reply.sequence, reply.step, (), 0, since_ns)

    def _release_dropped(self) -> None:
        """Give back the slots that nobody waits for and the teacher is done with."""
        ring = self._open.ring
        dropped, self._dropped = self._dropped, []
        for sequence in dropped:
            if ring.answered(sequence):
                self._release_slot(sequence)
            else:
                self._dropped.append(sequence)

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
