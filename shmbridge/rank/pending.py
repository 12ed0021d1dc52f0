"""What a rank holds of one request: Pending, then a Lease on its Reply, or its chunks. SendQueue orders those of a prefetch.

References run one way, lease -> requests and pending -> requests, so that a loop which runs with the garbage collector off
holds neither a slot nor a mapping longer than its own variables do.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from shmbridge.errors import Closed, RingFull
from shmbridge.rank.reply import Reply
from shmbridge.rank.requests import Requests, Sent
from shmbridge.rank.validate import CheckedRequest

Chunks = Generator[tuple[slice, Reply], None, None]

_READ_A_LEASE = "Use `with pending.wait() as reply:` and read the reply inside the block, or `reply = pending.copy()`."


class Lease:
    """The right to read one reply in place. Used as `with pending.wait() as reply:`; released at the end of the block.

    The tensors may lie in memory that the teacher writes again after the release: finish the backward inside the block.
    `Reply` tells what happens otherwise. A lease that is dropped without a release is released when the bridge is next used,
    unless its `reply` is still referred to. With its bridge a lease ends as well.
    """

    __slots__ = ("_requests", "_sent", "_since_ns", "reply")

    def __init__(self, requests: Requests | None, sent: Sent, reply: Reply) -> None:
        self._requests = requests
        self._sent = sent
        self._since_ns = time.monotonic_ns()
        self.reply = reply

    def release(self) -> None:
        """Give the slot back; a prefetch sends its next batches. Once is enough; more does nothing."""
        requests = self._requests
        if requests is not None:
            self._end()
            requests.fill_ring()

    def _end(self) -> None:
        if self._requests is not None:
            requests, self._requests = self._requests, None
            self.reply.forget()
            requests.release(self._sent, self._since_ns)

    def __enter__(self) -> Reply:
        return self.reply

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.release()
        else:  # the loop ends, so nothing more is sent
            self._end()

    if not TYPE_CHECKING:  # a type checker finds these by itself

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"a Lease has no {name!r}. {_READ_A_LEASE}")

        def __getitem__(self, name: object) -> NoReturn:
            raise TypeError(f"a Lease has no {name!r}. {_READ_A_LEASE}")


class Pending:
    """A request whose reply was not read yet.

    What `submit` gives was sent. What a prefetch gives is sent in its order as the ring has room, at the latest by `wait`, `chunks`
    or `copy`; until then another request may withdraw it from the ring, and it is sent again.
    """

    __slots__ = ("__weakref__", "_chunks", "_queue", "_request", "_requests", "_sent")

    def __init__(
        self,
        requests: Requests | None,
        sent: Sent | None,
        request: CheckedRequest | None = None,
        queue: SendQueue | None = None,
    ) -> None:
        """What was `sent`, or the `request` that `queue` is to send."""
        self._chunks: weakref.ref[Chunks] | None = None  # what `chunks` gave last
        self._queue = queue  # until it is waited for or cancelled
        self._request = request
        self._sent = sent
        # None: there is no reply to give back, because it was read or cancelled, or because nobody answers.
        self._requests = None if sent is not None and sent.missing else requests

    @property
    def sequence(self) -> int | None:
        """The rank's own count of its requests. None: not in the ring yet; a request that is withdrawn and sent again gets
        another one."""
        return None if self._sent is None else self._sent.sequence

    @property
    def step(self) -> int | None:
        """As given to submit."""
        asked = self._sent or self._request
        return asked.step if asked else None

    @property
    def done(self) -> bool:
        """True once `wait` would not have to sleep; of a streamed reply, once its last chunk is published. False while it is not
        sent."""
        if self._requests is None:
            return True
        return self._sent is not None and self._requests.answered(self._sent)

    def wait(self, timeout: float | None = None) -> Lease:
        """Send it where it was not, and sleep until the teacher has answered; a lease on the reply:
        `with pending.wait() as reply:`.

        The reply may be read in place. Finish the backward inside the block; `Reply` tells what happens otherwise.

        Args:
            timeout: seconds. None: timeouts.request_s of the config.

        Raises:
            TeacherError: the forward raised for this request; the slot is free again and the teacher lives.
            TeacherDied, TrainerDied, LauncherDied: somebody else ended; names the step and the sequence.
            DeadlineExceeded: nobody died and nobody answered. `wait` may be called again.
            Closed: this Pending was waited for before, or its bridge is closed.
            RequestRefused: the session streams its replies; use `chunks` or `copy`.
            RingFull: it was not sent, and other replies hold all slots of the ring. `wait` may be called again.
        """
        requests, sent = self._in_ring(timeout)
        if requests is None or not requests.wait(sent, timeout):
            self._requests = None
            return Lease(None, sent, _missing(sent))
        try:
            self._requests = None  # from here on the slot is the lease's, or given back
            return Lease(requests, sent, requests.read(sent))
        except BaseException:
            requests.cancel(sent.sequence)
            raise

    def chunks(self, timeout: float | None = None) -> Chunks:
        """The reply piece by piece: `for rows, chunk in pending.chunks()`. It is sent by the first step of the loop where it was
        not.

        `rows` is a slice of the request's positions (batch x seq, or those it chose) in row-major order, and the tensors of
        `chunk` have that many rows. Chunks come in order; each is given back when the next is asked for. Where the
        session does not stream there is one, the whole reply. A loop that is left early abandons the rest.

        Args:
            timeout: seconds for each chunk. None: timeouts.request_s of the config.

        Raises:
            RequestRefused: an older reply of this rank is still to be read; they are streamed in order.
            What `wait` raises. DeadlineExceeded before the first chunk leaves the Pending as it was; later it abandons
            the rest.
        """
        chunks = self._read(timeout)
        self._chunks = weakref.ref(chunks)  # not the generator itself, which refers to this Pending
        return chunks

    def _read(self, timeout: float | None) -> Chunks:
        requests, sent = self._in_ring(timeout)
        if requests is None:
            yield slice(0, None), _missing(sent)
        elif requests.streams:
            answered = requests.begin(sent, timeout)
            self._requests = None
            if answered:
                yield from requests.chunks(sent, timeout)
                requests.fill_ring()
            else:
                yield slice(0, None), _missing(sent)
        else:
            with self.wait(timeout) as reply:
                chunk = requests.as_chunk(reply, sent)
                try:
                    yield slice(0, sent.extent.positions), chunk
                finally:
                    chunk.forget()

    def copy(self, timeout: float | None = None) -> Reply:
        """Wait, and copy the reply out of its slot or its chunks: tensors of one's own, no lease. Raises what `wait` and
        `chunks` raise."""
        requests, sent = self._in_ring(timeout)
        if requests is not None and requests.streams:
            return requests.assemble(sent, self.chunks(timeout))
        with self.wait(timeout) as reply:
            return reply.owned()

    def cancel(self) -> None:
        """Nobody will read the reply, or what is left of its chunks: the teacher need not compute it, and its slot is free
        again soon. A loop over the chunks ends. A request that was not sent is not sent."""
        reading = self._chunks() if self._chunks else None
        if reading is not None:
            reading.close()
        requests, self._requests, self._queue = self._requests, None, None
        if requests is not None and self._sent is not None:
            requests.cancel(self._sent.sequence)

    def __del__(self) -> None:
        """Dropped without a lease: cancelled when the bridge is next used. (Any thread may run this.)"""
        requests = getattr(self, "_requests", None)  # absent where a KeyboardInterrupt came within __init__
        if requests is not None and self._sent is not None:
            requests.dropped.append(self._sent.sequence)

    def _in_ring(self, timeout: float | None) -> tuple[Requests | None, Sent]:
        """Send it where it was not. The requests are None where nobody answers."""
        if self._requests is None and not (self._sent is not None and self._sent.missing):
            which = "this request" if self._sent is None else f"sequence {self._sent.sequence}"
            raise Closed(f"{which} was waited for or cancelled before; a reply is leased once.")
        if self._queue is not None:
            self._queue.send(self, timeout)
        assert self._sent is not None, "what is in no queue was sent"
        return self._requests, self._sent


class SendQueue:
    """The requests of a prefetch that nobody waited for yet, in order: the first ones are in the ring, the others follow as it
    has room.

    Each Pending is referred to weakly, so one that is dropped is neither sent nor kept.
    """

    def __init__(self) -> None:
        self._pendings: list[weakref.ref[Pending]] = []

    def add(self, requests: Requests, request: CheckedRequest) -> Pending:
        """A Pending behind all others. It is not sent yet."""
        pending = Pending(requests, None, request, self)
        self._pendings.append(weakref.ref(pending))
        return pending

    def fill_ring(self) -> None:
        """Send as many requests as the ring has room for. Does not sleep."""
        for pending in self._queued():
            if pending._sent is None:
                assert pending._requests is not None
                if not pending._requests.has_room(self):
                    return
                self._send(pending, None)

    def send(self, pending: Pending, timeout: float | None) -> None:
        """Send `pending`, after what is in front of it. It leaves the queue: it is waited for, and not withdrawn any more. Raises
        what Requests.send raises."""
        if pending._requests is not None:
            pending._requests.stopping.heed()
        queued = self._queued()
        place = queued.index(pending)
        for each in queued[: place + 1]:
            if each._sent is None:
                try:
                    self._send(each, timeout)
                except RingFull as full:
                    if not place:
                        raise
                    unread = (
                        "1 batch that this prefetch handed out before this one is"
                        if place == 1
                        else f"{place} batches that this prefetch handed out before this one are"
                    )
                    raise RingFull(
                        f"{full} {unread} not read. Its batches are sent in order: read them in that order, or cancel them."
                    ) from None
        pending._queue = None
        self.fill_ring()

    def withdraw(self) -> None:
        """Cancel what was sent; it is sent again later."""
        for pending in self._queued():
            if pending._requests is not None and pending._sent is not None:
                pending._requests.dropped.append(pending._sent.sequence)  # first: a KeyboardInterrupt comes anywhere
                pending._sent = None

    def _queued(self) -> list[Pending]:
        """What nobody waited for, cancelled or dropped."""
        queued = [pending for known in self._pendings if (pending := known()) is not None and pending._queue is self]
        self._pendings = [weakref.ref(pending) for pending in queued]
        return queued

    def _send(self, pending: Pending, timeout: float | None) -> None:
        requests, request = pending._requests, pending._request
        assert requests is not None and request is not None
        sequence = requests.next_sequence
        try:
            pending._sent = requests.send(request, self, timeout)
        except BaseException:  # a KeyboardInterrupt comes anywhere
            pending._sent = None
            requests.cancel_since(sequence)
            raise
        if pending._sent.missing:
            pending._requests = None


def _missing(sent: Sent) -> Reply:
    return Reply({}, sent.sequence, sent.step, None)
