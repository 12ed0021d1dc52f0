"""Replies on their way to the ranks: written, published in the order in which they were sealed, or streamed chunk by chunk.

A reply is published after its bytes have arrived. On the CPU and on the CUDA plane that is at once. Where a GPU copies to host
memory, a thread waits for each copy and publishes behind it, so that the forward's thread does not wait.

Of a streamed reply a few chunks are sent at a time, as fast as the rank reads them. What the forward returned is kept until the
rank has taken it; no lane waits for another lane's reader. The output head is applied to one chunk at a time, so the memory for
replies and for the head does not grow with the number of tokens. A model without a separate head keeps its whole logits here until
they are read.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from shmbridge.log import Trace, logger
from shmbridge.output_spec import Extent, Offer, reply_bytes
from shmbridge.plane import cuda_runtime, factory
from shmbridge.plane.base import TeacherPlane
from shmbridge.plane.cuda_slab import Slabs
from shmbridge.shm.session import Lane
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher import payload
from shmbridge.teacher.batch import Answer
from shmbridge.teacher.payload import Encoder, Selection


class Trouble(NamedTuple):
    """What a forward or an encoder raised, as text: the exception itself would keep its frames, and their tensors, alive."""

    summary: str
    traceback: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> Trouble:
        """Raises the error itself where no later call of CUDA can succeed."""
        if cuda_runtime.is_sticky(error):
            raise error
        return cls(repr(error), "".join(traceback.format_exception(error)), cuda_runtime.is_out_of_memory(error))


class Publisher:
    """Publishes the replies of one teacher. Its thread starts with the first reply that must be waited for."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], None] | None, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def after(self, arrived: Callable[[], None] | None, publish: Callable[[], None]) -> None:
        """Call `publish` once `arrived` has returned, and after all that was handed in before."""
        if self._thread is None:
            if arrived is None:
                publish()
                return
            self._thread = threading.Thread(target=self._run, name="shmbridge-publisher", daemon=True)
            self._thread.start()
        self._queue.put((arrived, publish))

    def check(self) -> None:
        """Raise the error that waiting has raised: one of CUDA, after which nothing can be answered."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Publish what is sealed. Raises what `check` raises."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self) -> None:
        while (sealed := self._queue.get()) is not None:
            arrived, publish = sealed
            try:
                if arrived is not None:
                    arrived()
                publish()
            except BaseException as error:
                self._error = error
                return


class _Chunk(NamedTuple):
    """Positions start to stop of a selection, which go to `position` of the reply and on."""

    selection: Selection
    start: int
    stop: int
    position: int


class _Stream(NamedTuple):
    """A streamed reply, and what is still to be sent of it."""

    answer: Answer
    chunks: deque[_Chunk]


class Replies:
    """The replies of one teacher to the lanes that it serves in one generation."""

    def __init__(
        self, session: TeacherSession, encoder: Encoder, agreed: Offer, device: torch.device, slabs: Slabs
    ) -> None:
        """Map the reply memory, which the owner has created for `agreed`. Raises AttachError."""
        self._session = session
        self._encoder = encoder
        self._agreed = agreed
        self._device = device
        self._slabs = slabs
        self._planes: dict[int, TeacherPlane] = {}
        for lane in session.served:
            self.adopt(lane)
        shape = session.control.shape
        self.streamed = shape.chunks > 0
        self._chunk_positions = shape.chunk_positions
        self.streams: dict[int, _Stream] = {}  # by lane, at most one of each
        self.publisher = Publisher()
        self._trace = Trace.of("teacher", session.index)

    def adopt(self, lane: Lane) -> None:
        """Map the reply memory of a lane. Raises AttachError."""
        self._planes[lane.index] = factory.of_teacher(self._session, lane, self._agreed, self._device, self._slabs)

    def settled(self) -> bool | None:
        """True once this process, and its GPU memory with it, may go: every rank that is there has what was published. Else None."""
        lanes = [lane for lane in self._session.served if not lane.ring.closed and not self._session.gone(lane)]
        return True if all(self._planes[lane.index].settled() for lane in lanes) else None

    def write(self, answer: Answer, selection: Selection, row: int) -> None:
        """Write the payload of a selection, which begins at `row` of the request, into the reply's slot."""
        plane, request = self._planes[answer.lane.index], answer.request
        for start, outputs in payload.parts(self._encoder, selection):
            plane.write(request.sequence, request.extent, outputs, answer.positions + start, row)

    def fail(self, answer: Answer, trouble: Trouble) -> None:
        """The reply will be the error."""
        answer.error = trouble.traceback
        logger.warning("rank %d's forward raised %s; the rank is told", answer.lane.index, trouble.summary)

    def finish(self, answer: Answer) -> None:
        """Every row is computed, or has failed: publish the reply, or begin to stream it."""
        selections, answer.selections = answer.selections, []  # the round that made them may be held for long
        if not self.streamed or answer.error is not None:
            self._publish(answer)
            return
        assert answer.lane.index not in self.streams
        sent = answer.lane.ring.streamed_of(answer.request.sequence)  # by an earlier teacher
        chunks: deque[_Chunk] = deque()
        position = 0
        for selection in selections:
            for start in range(max(0, sent - position), selection.positions, self._chunk_positions):
                stop = min(selection.positions, start + self._chunk_positions)
                chunks.append(_Chunk(selection, start, stop, position + start))
            position += selection.positions
        self.streams[answer.lane.index] = _Stream(answer, chunks)

    def skip(self, answer: Answer) -> None:
        """Publish an empty reply: the request was abandoned."""
        answer.lane.ring.skip_reply(answer.request.sequence)
        self._seal(answer, None, skipped=True)

    def _publish(self, answer: Answer) -> None:
        sequence = answer.request.sequence
        answer.lane.ring.write_reply(sequence, answer.composition, answer.error, answer.echo)
        whole = not self.streamed and answer.error is None
        self._seal(answer, self._planes[answer.lane.index].seal(sequence) if whole else None)

    def _seal(self, answer: Answer, arrived: Callable[[], None] | None, *, skipped: bool = False) -> None:
        """The reply is written. Publish it when `arrived` has returned."""

        def publish() -> None:
            answer.lane.ring.publish_reply(answer.request.sequence)
            self._session.ring_members(answer.lane)
            if not skipped:
                extent = Extent(0, 0) if self.streamed or answer.error else answer.request.extent
                self.trace("reply", answer, extent, time.monotonic_ns() - answer.composition.forward_ns)

        answer.lane.ring.seal_reply(answer.request.sequence)
        self.publisher.after(arrived, publish)

    def advance(self) -> bool:
        """Send one chunk of each lane that has room. End the replies that are complete, or whose rank has abandoned them or closed.
        Returns whether to call again at once: a rank that reads as fast as it is sent to must not keep the others waiting."""
        moved = [self._advance(stream) for stream in list(self.streams.values())]
        return any(moved)

    def _advance(self, stream: _Stream) -> bool:
        """Send one chunk of a lane. False where there is no room for another, or nothing left."""
        answer, chunks = stream
        ring = answer.lane.ring
        if ring.abandoned > answer.request.sequence or ring.closed:
            chunks.clear()
        if chunks:
            if not ring.has_room():
                return False
            try:
                self._send(answer, chunks.popleft())
            except Exception as error:
                chunks.clear()
                self.fail(answer, Trouble.of(error))
        if chunks:
            return ring.has_room()
        del self.streams[answer.lane.index]
        self._publish(answer)
        return False

    def _send(self, answer: Answer, chunk: _Chunk) -> None:
        started = time.monotonic_ns()
        ring = answer.lane.ring
        plane, number, count = self._planes[answer.lane.index], ring.filled, chunk.stop - chunk.start
        extent = Extent(0, 0, count)
        plane.write(number, extent, self._encoder.encode(chunk.selection, chunk.start, chunk.stop))
        ring.write_chunk(answer.request.sequence, chunk.position, count)
        took = answer.composition.forward_ns + time.monotonic_ns() - started
        answer.composition = answer.composition._replace(forward_ns=took)

        def publish() -> None:
            ring.publish_chunk()
            self._session.ring_members(answer.lane)
            self.trace("chunk", answer, extent, answer.request.submitted_ns)

        self.publisher.after(plane.seal(number), publish)

    def trace(self, event: str, answer: Answer, extent: Extent | None, since_ns: int) -> None:
        """Log a hand-over where the level is debug: of the outputs for `extent`, or of the request's IDs."""
        if self._trace:
            request = answer.request
            self._trace.hand_over(
                event,
                lane=answer.lane.index,
                step=request.step,
                sequence=request.sequence,
                slot=request.sequence % answer.lane.ring.depth,
                shape=(request.extent.batch, request.extent.seq),
                nbytes=len(request.ids) if extent is None else reply_bytes(self._agreed.outputs, extent),
                since_ns=since_ns,
            )
