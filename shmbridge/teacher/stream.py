"""Replies on their way: published in the order in which they were sealed, and streamed replies chunk by chunk.

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
from collections.abc import Callable, Mapping
from typing import NamedTuple

from shmbridge.output_spec import Extent
from shmbridge.plane.base import TeacherPlane
from shmbridge.teacher.batch import Answer
from shmbridge.teacher.payload import Encoder


class _Sealed(NamedTuple):
    arrived: Callable[[], None] | None
    publish: Callable[[], None]


class Publisher:
    """Publishes the replies of one teacher. Its thread starts with the first reply that must be waited for."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Sealed | None] = queue.SimpleQueue()
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
        self._queue.put(_Sealed(arrived, publish))

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
            try:
                if sealed.arrived is not None:
                    sealed.arrived()
                sealed.publish()
            except BaseException as error:
                self._error = error
                return


class _Stream:
    """The rest of one streamed reply."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.parts = answer.parts  # the first of them is partly sent
        self.sent_of_part = 0
        self.sent = 0

    def skip(self, positions: int) -> None:
        """An earlier teacher has already sent the first `positions`."""
        self.sent = positions
        while positions and self.parts:
            here = min(positions, self.parts[0].positions)
            positions, self.sent_of_part = positions - here, here
            self.has_more()

    def has_more(self) -> bool:
        while self.parts and self.sent_of_part == self.parts[0].positions:
            self.parts.pop(0)
            self.sent_of_part = 0
        return bool(self.parts)


class Streams:
    """The streamed replies that are being sent: at most one of each lane."""

    def __init__(
        self,
        encoder: Encoder,
        planes: Mapping[int, TeacherPlane],
        publisher: Publisher,
        chunk_positions: int,
        sent: Callable[[Answer, int], None],
        failed: Callable[[Answer, Exception], None],
        publish: Callable[[Answer], None],
    ) -> None:
        """`sent` is called with every published chunk's answer and number of positions, `failed` with what an encoder raised,
        `publish` to end a reply."""
        self._encoder = encoder
        self._planes = planes
        self._publisher = publisher
        self._chunk = chunk_positions
        self._sent = sent
        self._failed = failed
        self._publish = publish
        self._by_lane: dict[int, _Stream] = {}

    def __len__(self) -> int:
        return len(self._by_lane)

    def __contains__(self, lane: int) -> bool:
        return lane in self._by_lane

    def begin(self, answer: Answer) -> None:
        """Start to send a reply, of which only the head is still to be computed."""
        assert answer.lane.index not in self._by_lane
        stream = self._by_lane[answer.lane.index] = _Stream(answer)
        stream.skip(answer.lane.ring.streamed_of(answer.request.sequence))

    def drop(self, lane: int) -> None:
        """Forget the reply to a rank that is gone."""
        stream = self._by_lane.pop(lane, None)
        if stream:
            stream.parts.clear()  # the round that made it may still be held

    def advance(self) -> bool:
        """Send one chunk of each lane that has room. End the replies that are complete, or whose rank has abandoned them or closed.
        Returns whether to call again at once: a rank that reads as fast as it is sent to must not keep the others waiting."""
        moved = [self._step(lane) for lane in list(self._by_lane)]
        return any(moved)

    def _step(self, lane: int) -> bool:
        """Send one chunk of a lane. False where there is no room for another, or nothing left."""
        stream = self._by_lane[lane]
        ring, sequence = stream.answer.lane.ring, stream.answer.request.sequence
        unread = ring.abandoned > sequence or ring.closed
        if stream.has_more() and not unread:
            if not ring.has_room():
                return False
            try:
                self._send(stream)
            except Exception as error:
                stream.parts.clear()
                self._failed(stream.answer, error)
        if stream.has_more() and not unread:
            return ring.has_room()
        del self._by_lane[lane]
        stream.parts.clear()  # the round that made it may still be held
        self._publish(stream.answer)
        return False

    def _send(self, stream: _Stream) -> None:
        started = time.monotonic_ns()
        rows, start = stream.parts[0], stream.sent_of_part
        stop = min(rows.positions, start + self._chunk)
        answer = stream.answer
        ring, sequence = answer.lane.ring, answer.request.sequence
        extent = Extent(0, 0, stop - start)
        plane, number = self._planes[answer.lane.index], ring.filled
        plane.write(number, extent, self._encoder.encode_part(rows, start, stop))
        ring.write_chunk(sequence, stream.sent, stop - start)
        stream.sent_of_part = stop
        stream.sent += stop - start
        took = answer.composition.forward_ns + time.monotonic_ns() - started
        answer.composition = answer.composition._replace(forward_ns=took)
        self._publisher.after(plane.seal(number), lambda: self._publish_chunk(answer, stop - start))

    def _publish_chunk(self, answer: Answer, count: int) -> None:
        answer.lane.ring.publish_chunk()
        self._sent(answer, count)
