"""The trainer's side: submit, wait, lease.

    bridge = shmbridge.connect()
    bridge.wait_ready()
    pending = bridge.submit(input_ids)          # returns at once
    with pending.wait() as reply:               # a lease on the teacher's output
        loss = kd_loss(student_logits, reply.logits)
        loss.backward()
    reply = bridge.exchange(input_ids)          # the simple way: the caller owns the tensors
    for batch, pending in bridge.prefetch(loader):
        ...                                     # the teacher is ahead of the loop

This module has what a training script calls. `in_flight` has the requests, `pending` what the script holds of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, Unpack

import torch

from shmbridge import log
from shmbridge.config import Config
from shmbridge.errors import PeerLost, RequestRefused, RunStopped, TeacherDied
from shmbridge.head import Head
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import shared_head
from shmbridge.rank import parity
from shmbridge.rank.in_flight import Requests
from shmbridge.rank.lifecycle import Lifecycle
from shmbridge.rank.pending import Lease, Pending
from shmbridge.rank.prefetch import Prefetch, Tokens
from shmbridge.rank.reply import Reply
from shmbridge.rank.request import Extras, Given, IntArray, Request, check_request
from shmbridge.rank.stats import Stats
from shmbridge.shm.heartbeat import Heartbeat
from shmbridge.shm.rank_session import RankSession

__all__ = ["Bridge", "Lease", "Pending", "Reply"]

T = TypeVar("T")


class Bridge:
    """One rank's connection to the teacher. Made by `connect`.

    Where the bridge is off (`enabled` is False) the same calls work, nobody answers, and every reply is `missing`.
    """

    def __init__(self, session: RankSession | None, device: torch.device | None = None, *, rank: int = 0) -> None:
        """`session` is None where the bridge is off; `rank` counts only then."""
        self._session = session
        self.enabled = session is not None
        self.rank = session.lane.index if session else rank
        """This rank's lane: its LOCAL_RANK, unless connect was told otherwise."""
        self.settings = session.settings if session else Config(enabled=False)
        """The run's resolved config; its defaults where the bridge is off."""
        self._heartbeat: Heartbeat | None = None
        self._life = Lifecycle(session)
        self._device = device
        self._requests = Requests(self._life, session)
        self._offer: Offer | None = None  # until the barrier
        self._checked = not self.enabled  # the parity check has passed, or is off
        self._head: Head | None = None

    @property
    def teacher(self) -> Offer:
        """What the teacher offers: outputs, vocab_size, and the path of its tokenizer. Waits for the teacher.

        Raises:
            Closed: the bridge is off or closed.
            TeacherDied, DeadlineExceeded: see `wait_ready`.
        """
        return self._barrier()

    @property
    def head(self) -> Head:
        """The teacher's output head, on this rank's device and in the model's dtype: head(reply.hidden), of (..., width), are the
        logits (..., words). Waits for the teacher.

        On the CPU its weight (words, width) is shared with the other ranks and not to be written.

        Raises:
            RequestRefused: the payload is not hidden.
            Closed, TeacherDied, DeadlineExceeded: see `teacher`.
        """
        agreed = self._barrier()
        if agreed.head is None:
            raise RequestRefused("the teacher shares its head only with the payload hidden; set payload.hidden={}.")
        if self._head is None:
            self._head = shared_head.attach(self._life.session.token, agreed.head, self._requests.replies.device)
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
        what the model gives in its own process (`parity` of the config). Rank 0 logs the result in one line. Where the bridge is
        off it returns at once.

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
            RunStopped, TrainerDied, LauncherDied: the run has ended meanwhile.
            Closed: the bridge is closed.
        """
        if not self.enabled:
            return
        agreed = self._barrier(timeout)
        student = parity.Student(vocab_size, tokenizer, loss)
        if self._checked and all(part is None for part in student):
            return
        try:
            passed = parity.check(agreed, student, self._ask_probe, lambda: self.head)
        except TeacherDied as error:
            self._requests.go_on_without(error)
            passed = ""
        self._checked = True
        if passed and self.rank == 0:
            log.logger.info("parity check passed: %s", passed)
        self._requests.meter.reset()

    def submit(self, input_ids: Given, attention_mask: Given | None = None, **extras: Unpack[Extras]) -> Pending:
        """Hand a batch to the teacher and return at once. The first call waits for the teacher's model.

        Tensors are on the CPU, strided or not, and copied before the call returns. Tensors on a CUDA device are copied to the
        host first: the call then waits until the GPU has computed everything that it was given before, which a warning says once.

        Args:
            input_ids: (batch, seq) int32 or int64.
            attention_mask: (batch, seq) of 0 and 1, or None where every token counts.
            positions: (batch, seq) of 0 and 1: outputs come back, and the teacher's head is computed, for these alone.
            position_ids: (batch, seq) int32 or int64; they start at 0 again at each packed document.
            targets: (batch, seq) int32 or int64, with the payload logprobs: the words whose log-probability comes back, -100
                for none. None: the next token of each row, and none after its last.
            candidates: (batch, seq, c) int32 or int64, with payload.logprobs.candidates = c: words whose log-probabilities
                come back as `candidate_logprobs`.
            step: the training loop's own counter, for logs and reports; never a key.

        Returns:
            A Pending; where the bridge is off, or the teacher is lost and the run goes on without it, one whose reply is `missing`.

        Raises:
            RequestRefused (a ValueError): shape, dtype, device or an ID that the teacher cannot take; nothing was sent.
            RingFull: ring.depth requests are in flight.
            Closed, TeacherDied, DeadlineExceeded: see `wait_ready`.
        """
        request = self._check(input_ids, attention_mask, **extras)
        self._life.heed()
        self._requests.send(request)
        return Pending(self._requests, request)

    def exchange(
        self,
        input_ids: Given,
        attention_mask: Given | None = None,
        *,
        timeout: float | None = None,
        **extras: Unpack[Extras],
    ) -> Reply:
        """`submit` and `Pending.copy` in one call: a reply whose tensors the caller owns, on this rank's device.

        Args:
            timeout: seconds for the reply. None: timeouts.request_s of the config.
            Others: see `submit`.

        Raises what both raise.
        """
        sequence = self._requests.next_sequence
        try:
            return self.submit(input_ids, attention_mask, **extras).copy(timeout)
        except BaseException:  # a KeyboardInterrupt comes anywhere, and its handler may ask the teacher
            self._requests.cancel_since(sequence)
            raise

    def prefetch(
        self,
        batches: Iterable[T],
        tokens: Tokens[T] = None,
        *,
        ahead: int | None = None,
        state: Callable[[], Any] | None = None,
    ) -> Prefetch[T]:
        """Iterate over (batch, pending) with the teacher ahead of the loop: the next batches are taken before their turn, and
        their requests are sent in order as the ring has room.

            for batch, pending in bridge.prefetch(loader):
            for batch, pending in bridge.prefetch(loader, "tokens"):
            for batch, pending in bridge.prefetch(loader, lambda batch: {"input_ids": batch[0], "positions": batch[1]}):

        Batches are handed out in their order, each exactly once, and unchanged. At the end, on an exception of `batches`
        and on a `break`, nothing is lost and nothing stays in flight: see shmbridge.rank.prefetch. A loader that accelerate
        prepared behaves as without prefetch: see shmbridge.integrations.accelerate.

        A loop may draw all micro-batches of a step before it reads the first reply, at any ring.depth: a pending that the ring
        has no room for is sent when a reply before it was read, at the latest by its own `wait`. Read replies in the order of
        their batches. ring.depth is the number of leases that the loop holds at a time plus the replies that are to be computed
        beside them: 2 keeps the teacher busy where one lease is held at a time.

        Args:
            batches: a loader, or any iterable or iterator. It may use one buffer again and again: the token IDs are copied when
                a batch is taken.
            tokens: where a batch has its token IDs. None: the batch itself where it is a tensor or an array, or its entries
                "input_ids", "attention_mask" and "position_ids", the last two where they are there. A key: that entry
                alone. A function, called once for each batch: to input_ids (batch, seq), or to a dict of what `submit` takes, which is how
                `positions`, `targets`, `candidates` and `step` are sent.
            ahead: batches that are taken before their turn, beyond those that the loop has drawn. None: ring.depth - 1.
            state: called after each batch is taken from `batches`, such as loader.state_dict; what it gave for the batch of
                the loop is the iterator's `state`, so that a checkpoint resumes exactly.

        Raises (in the batch's turn):
            RequestRefused (a ValueError): it cannot be submitted, or `ahead` is negative.
            What `wait_ready` and `batches` raise. What happens to a request that was taken is raised by its pending: RingFull
            where the loop holds all slots, TeacherError, TeacherDied, DeadlineExceeded.
        """
        if ahead is None:
            ahead = self.settings.ring.depth - 1 if self.enabled else 0
        return Prefetch(self._requests, self._check, batches, tokens, ahead, state)

    def on_stop(self, save: Callable[[], object]) -> None:
        """Call `save()` once before this rank stops: at a SIGTERM (as Slurm sends it ahead of the end), a Ctrl-C or SIGTERM of
        the launcher, the loss of the teacher or of another rank. It runs in the thread and at the place of the next call of
        the bridge, which then raises a PeerLost; the launcher gives all ranks timeouts.save_s for it.

        Without a hook the launcher sends each rank SIGINT for a Ctrl-C and SIGTERM for a SIGTERM, once. What the script's own
        handlers, or its `except KeyboardInterrupt:`, do has timeouts.shutdown_s, and the teacher serves them.
        """
        self._life.on_stop(save)

    @property
    def stop_requested(self) -> bool:
        """Whether the user or the scheduler has stopped the run, so that a loop may save and end by itself."""
        return self._life.stop_requested

    @contextmanager
    def defer_stop(self) -> Iterator[None]:
        """In the block a stop of the run interrupts no call of the bridge: requests are answered as before, and `stop_requested`
        tells of the stop. Ranks that agree on it between two steps save and end at the same step, in a collective where saving
        is one. For ranks with a hook (`on_stop`), within timeouts.save_s. The loss of the teacher or of a rank is raised as ever.
        """
        self._life.deferrals += 1
        try:
            yield
        finally:
            self._life.deferrals -= 1

    @contextmanager
    def phase(self, name: str, timeout: float) -> Iterator[None]:
        """Say what the script does in the block, such as `with bridge.phase("eval", timeout=900):`. For `timeout` seconds it is no
        fault that this rank's loop stands still; hang reports name the phase. Raises Closed."""
        with self._life.session.record.declaring(name, timeout) if self.enabled else nullcontext():
            yield

    def stats(self) -> Stats:
        """What this rank's replies took so far, in seconds, since `wait_ready`. Raises what `wait_ready` raises.

        How long a GPU stood still for replies is measured on rank 0 where log.stats_every is not 0, and on any rank from its
        first call of this on.
        """
        if not self._checked:
            self.wait_ready()
        if self.enabled:
            self._requests.replies.plane.timed = True
        return self._requests.meter.total()

    @property
    def free_slots(self) -> int:
        """Requests that could be submitted now. Waits for the teacher. Raises what `wait_ready` raises, and Closed."""
        if not self._checked:
            self.wait_ready()
        return self._requests.free_slots

    def close(self) -> None:
        """No request follows; the teacher and the other ranks go on. Once is enough; more does nothing. Leases end.

        connect() gives another bridge over the same lane, as long as the teacher serves: see teacher.serve_until.

        Raises:
            TornReply: the last reply, which this rank's GPU had still to read, was not whole.
        """
        self._close("the bridge is closed.", closes_lane=True)

    def start_heartbeat(self) -> None:
        """Show that this process lives, and watch its GPU, until the bridge is closed."""
        self._heartbeat = Heartbeat(self._life.session.record, self._requests.watchdog.look)

    def give_way(self) -> RankSession | None:
        """Close this bridge, and open its lane for another one of this process. None: the bridge is that of the process which this
        one was forked from. Raises what RankSession.reopen raises, and TornReply."""
        if os.getpid() != self._life.process:
            return None
        self._close(
            "connect() was called again, which closed this bridge; use the one that it gave.", closes_lane=False
        )
        assert self._session is not None, "a bridge that is off gives way to nobody"
        self._session.reopen()
        return self._session

    def _close(self, why: str, *, closes_lane: bool) -> None:
        if not self._life.close(why):
            return
        try:
            if self._offer is not None:
                self._requests.replies.close()
        finally:
            if self._heartbeat and not self._requests.watchdog.broken_at:
                self._heartbeat.stop()  # else it ends a process whose clean-up hangs
            self._life.end()
            if closes_lane and self._session is not None:
                self._session.close()

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None:
            died = self._requests.watchdog.blame(error) if self._life.usable else None
            self._fail(died or error)
            self.close()
            if died:
                raise died from error
        self.close()

    def _fail(self, error: BaseException) -> bool:
        """Tell the session that this rank ends by an exception. False where that is no failure: a clean SystemExit, and the
        end of a rank in a run that the user, or the scheduler, has stopped."""
        usable = self.enabled and self._life.usable
        if isinstance(error, KeyboardInterrupt) and usable:
            stopped = self._life.session.is_told_to_stop()
        else:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit, RunStopped)) and self._life.asked_to_stop
        if stopped or (isinstance(error, SystemExit) and error.code in (None, 0)):
            return False
        if usable:
            if self._offer is not None:
                self._requests.replies.explain(error)
            self._life.session.record.fail_with(self._requests.watchdog.blame(error) or error)
        return True

    def _barrier(self, timeout: float | None = None) -> Offer:
        """What the teacher offers, once its model is loaded."""
        session = self._life.session
        if self._offer is None:
            try:
                agreed = session.wait_ready(session.settings.timeouts.startup_s if timeout is None else timeout)
            except PeerLost:
                self._life.save()
                raise
            self._requests.open(agreed, self._device)
            self._offer = agreed
        return self._offer

    def _check(self, input_ids: Given, attention_mask: Given | None = None, **extras: Unpack[Extras]) -> Request:
        """The arguments of `submit`, once every limit was checked. Where the bridge is off nothing is checked, and nothing is sent."""
        if not self._checked:
            self.wait_ready()
        if self._offer is None:
            return Request(memoryview(b""), Extent(0, 0), {}, extras.get("step"))
        return check_request(input_ids, attention_mask, extras, self._offer, self._life.session.control.shape)

    def _ask_probe(self, ids: IntArray, extent: Extent, arrays: dict[str, memoryview]) -> tuple[Reply, int]:
        """A request of the parity check: the reply, and the CRC-32 of the IDs as the teacher read them."""
        request = Request(ids.data.cast("B"), extent, arrays)
        self._requests.send(request, probe=True)
        reply = Pending(self._requests, request).copy(self.settings.timeouts.startup_s)
        if reply.missing:
            raise TeacherDied("the teacher was lost during the parity check.")
        return reply, self._requests.replies.last_head.echo
