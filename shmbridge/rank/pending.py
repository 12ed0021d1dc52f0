"""What a rank holds of one request: Pending, then a Lease on its Reply, or its chunks.

References run one way, lease -> requests and pending -> requests, so that a loop which runs with the garbage collector off
holds neither a slot nor a mapping longer than its own variables do.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, NoReturn

from shmbridge.errors import Closed, RequestRefused
from shmbridge.rank.in_flight import Requests
from shmbridge.rank.reply import Reply, flat
from shmbridge.rank.request import UNSENT, Request

Chunks = Generator[tuple[slice, Reply], None, None]

_READ_A_LEASE = "Use `with pending.wait() as reply:` and read the reply inside the block, or `reply = pending.copy()`."


class Lease:
    """The right to read one reply in place. Used as `with pending.wait() as reply:`; released at the end of the block.

    The tensors may lie in memory that the teacher writes again after the release: finish the backward inside the block.
    `Reply` tells what happens otherwise. A lease that is dropped without a release is released when the bridge is next used,
    unless its `reply` is still referred to. With its bridge a lease ends as well.
    """

    __slots__ = ("_request", "_requests", "_since_ns", "reply")

    def __init__(self, requests: Requests | None, request: Request, reply: Reply) -> None:
        self._requests = requests  # None: there is no slot to give back
        self._request = request
        self._since_ns = time.monotonic_ns()
        self.reply = reply

    def release(self) -> None:
        """Give the slot back; a prefetch sends its next batches. Once is enough; more does nothing."""
        requests = self._requests
        if requests is not None:
            self._end()
            requests.fill_ring()

    def _end(self) -> None:
        requests, self._requests = self._requests, None
        if requests is not None:
            self.reply.forget()
            requests.release(self._request, self._since_ns)

    def __enter__(self) -> Reply:
        return self.reply

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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
    """A request whose reply was not read yet. One that is dropped is cancelled when the bridge is next used.

    What `submit` gives was sent. What a prefetch gives is sent in its order as the ring has room, at the latest by `wait`, `chunks`
    or `copy`; until then another request may withdraw it from the ring, and it is sent again.
    """

    __slots__ = ("__weakref__", "_chunks", "_request", "_requests")

    def __init__(self, requests: Requests, request: Request) -> None:
        self._chunks: weakref.ref[Chunks] | None = None  # what `chunks` gave last
        self._request = request
        self._requests: Requests | None = (
            requests  # None: there is no reply to give back, it was waited for or cancelled
        )

    @property
    def sequence(self) -> int | None:
        """The rank's own count of its requests. None: not in the ring yet; a request that is withdrawn and sent again gets
        another one."""
        return None if self._request.sequence == UNSENT else self._request.sequence

    @property
    def step(self) -> int | None:
        """As given to submit."""
        return self._request.step

    @property
    def done(self) -> bool:
        """True once `wait` would not have to sleep; of a streamed reply, once its last chunk is published. False while it is not
        sent."""
        if self._requests is None or self._request.missing:
            return True
        ring = self._requests.life.session.ring
        return self._request.sequence != UNSENT and ring.answered(self._request.sequence) is True

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
        requests, request = self._send(timeout), self._request
        if requests.streams and not request.missing:
            raise RequestRefused("this session streams its replies; use pending.chunks(), or pending.copy().")
        if request.missing or not requests.wait(request, timeout):
            return Lease(None, request, _missing(request))
        try:
            self._requests = None  # from here on the slot is the lease's, or given back
            return Lease(requests, request, requests.read(request))
        except BaseException:
            requests.cancel(request.sequence)
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
        requests, request = self._send(timeout), self._request
        positions = request.extent.positions
        if not requests.streams or request.missing:
            with self.wait(timeout) as reply:
                if reply.missing:
                    yield slice(0, None), reply
                    return
                chunk = requests.replies.as_chunk(request, reply)
                try:
                    yield slice(0, positions), chunk
                finally:
                    chunk.forget()
            return
        first = requests.first_wanted()
        if request.sequence != first:
            raise RequestRefused(
                f"sequence {first} is to be read before sequence {request.sequence}: replies are streamed in the order of their "
                "requests. Read or cancel it first."
            )
        if not requests.wait(request, timeout):
            yield slice(0, positions), _missing(request)
            return
        self._requests = None  # from here on what is not read is cancelled
        start = 0
        try:
            while start < positions:
                if not requests.wait(request, timeout):
                    yield slice(start, positions), _missing(request)
                    return
                number, reply, end = requests.replies.read_chunk(request, start)
                try:
                    yield slice(start, end), reply
                finally:
                    reply.forget()
                    if requests.life.usable:
                        requests.replies.release_chunk(number)
                start = end
            if requests.wait(request, timeout):
                requests.replies.head(request)
        finally:
            requests.cancel(request.sequence)
        requests.fill_ring()

    def copy(self, timeout: float | None = None) -> Reply:
        """Wait, and copy the reply out of its slot or its chunks: tensors that the caller owns, no lease. Raises what `wait` and
        `chunks` raise."""
        requests, request = self._send(timeout), self._request
        if not requests.streams or request.missing:
            with self.wait(timeout) as reply:
                return reply.owned()
        whole = requests.replies.empty(request)
        for rows, chunk in self.chunks(timeout):
            if chunk.missing:
                return chunk
            for name, tensor in whole.items():
                flat(tensor, request.extent)[rows] = chunk[name]
        composition = None if request.missing else requests.replies.last_head.composition
        return Reply(whole, request.sequence, request.step, composition)

    def cancel(self) -> None:
        """Nobody will read the reply, or what is left of its chunks: the teacher need not compute it, and its slot is free
        again soon. A loop over the chunks ends. A request that was not sent is not sent."""
        reading = self._chunks() if self._chunks else None
        if reading is not None:
            reading.close()
        request, requests = self._request, self._requests
        self._requests = request.queue = None
        if requests is not None and request.sequence != UNSENT and not request.missing:
            requests.cancel(request.sequence)

    def _send(self, timeout: float | None) -> Requests:
        """Send it where it was not. Raises what Requests.send raises; Closed too where it was waited for or cancelled."""
        requests, request = self._requests, self._request
        if requests is None:
            which = "this request" if request.sequence == UNSENT else f"sequence {request.sequence}"
            raise Closed(f"{which} was waited for or cancelled before; a reply is leased once.")
        requests.life.check()
        if request.queue is not None:
            request.queue.send(request, timeout)
        return requests


def _missing(request: Request) -> Reply:
    """A reply without tensors."""
    return Reply({}, request.sequence, request.step)
