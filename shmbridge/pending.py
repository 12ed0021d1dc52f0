"""What a rank holds of one request: Pending, then a Lease on its Reply, or its chunks.

References run one way, lease -> requests and pending -> requests, so that a loop which runs with the garbage collector off
holds neither a slot nor a mapping longer than its own variables do.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, NoReturn

from shmbridge.errors import Closed
from shmbridge.reply import Reply
from shmbridge.requests import Requests, Sent

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
        """Give the slot back. Once is enough; more does nothing."""
        if self._requests is not None:
            requests, self._requests = self._requests, None
            self.reply.forget()
            requests.release(self._sent, self._since_ns)

    def __enter__(self) -> Reply:
        return self.reply

    def __exit__(self, *_: object) -> None:
        self.release()

    if not TYPE_CHECKING:  # a type checker finds these by itself

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"a Lease has no {name!r}. {_READ_A_LEASE}")

        def __getitem__(self, name: object) -> NoReturn:
            raise TypeError(f"a Lease has no {name!r}. {_READ_A_LEASE}")


class Pending:
    """A request that was submitted and not yet answered."""

    __slots__ = ("_chunks", "_requests", "_sent")

    def __init__(self, requests: Requests, sent: Sent) -> None:
        self._sent = sent
        self._chunks: weakref.ref[Chunks] | None = None  # what `chunks` gave last
        self._requests: Requests | None = requests

    @property
    def sequence(self) -> int:
        """The rank's own count of its requests."""
        return self._sent.sequence

    @property
    def step(self) -> int | None:
        """As given to submit."""
        return self._sent.step

    @property
    def done(self) -> bool:
        """True once `wait` would not have to; of a streamed reply, once its last chunk is published."""
        return self._requests is None or self._requests.answered(self._sent)

    def wait(self, timeout: float | None = None) -> Lease:
        """Sleep until the teacher has answered; a lease on the reply: `with pending.wait() as reply:`.

        The reply may be read in place. Finish the backward inside the block; `Reply` tells what happens otherwise.

        Args:
            timeout: seconds. None: timeouts.request_s of the config.

        Raises:
            TeacherError: the forward raised for this request; the slot is free again and the teacher lives.
            TeacherDied, TrainerDied, LauncherDied: somebody else ended; names the step and the sequence.
            DeadlineExceeded: nobody died and nobody answered. `wait` may be called again.
            Closed: this Pending was waited for before, or its bridge is closed.
            RequestRefused: the session streams its replies; use `chunks` or `copy`.
        """
        requests = self._waiting()
        if not requests.wait(self._sent, timeout):
            self._requests = None
            return Lease(None, self._sent, _missing(self._sent))
        self._requests = None  # from here on the slot is the lease's, or given back
        try:
            return Lease(requests, self._sent, requests.read(self._sent))
        except BaseException:
            requests.cancel(self.sequence)
            raise

    def chunks(self, timeout: float | None = None) -> Chunks:
        """The reply piece by piece: `for rows, chunk in pending.chunks()`.

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
        requests = self._waiting()
        if requests.streams:
            answered = requests.begin(self._sent, timeout)
            self._requests = None
            if answered:
                yield from requests.chunks(self._sent, timeout)
            else:
                yield slice(0, None), _missing(self._sent)
        else:
            with self.wait(timeout) as reply:
                chunk = requests.as_chunk(reply, self._sent)
                try:
                    yield slice(0, self._sent.extent.positions), chunk
                finally:
                    chunk.forget()

    def copy(self, timeout: float | None = None) -> Reply:
        """Wait, and copy the reply out of its slot or its chunks: tensors of one's own, no lease. Raises what `wait` and
        `chunks` raise."""
        requests = self._waiting()
        if requests.streams:
            return requests.assemble(self._sent, self.chunks(timeout))
        with self.wait(timeout) as reply:
            return reply.owned()

    def cancel(self) -> None:
        """Nobody will read the reply, or what is left of its chunks: the teacher need not compute it, and its slot is free
        again soon. A loop over the chunks ends."""
        reading = self._chunks() if self._chunks else None
        if reading is not None:
            reading.close()
        if self._requests is not None:
            requests, self._requests = self._requests, None
            requests.cancel(self.sequence)

    def __del__(self) -> None:
        """Dropped without a lease: cancelled when the bridge is next used. (Any thread may run this.)"""
        requests = getattr(self, "_requests", None)  # absent where a KeyboardInterrupt came within __init__
        if requests is not None:
            requests.dropped.append(self._sent.sequence)

    def _waiting(self) -> Requests:
        if self._requests is None:
            raise Closed(f"sequence {self.sequence} was waited for or cancelled before; a reply is leased once.")
        return self._requests


class MissingPending(Pending):
    """Of a request that nobody answers: the bridge is off, or its teacher is lost."""

    __slots__ = ()

    def __init__(self, sent: Sent) -> None:
        self._sent = sent

    def __del__(self) -> None:
        """There is no slot to give back."""

    @property
    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> Lease:
        return Lease(None, self._sent, _missing(self._sent))

    def chunks(self, timeout: float | None = None) -> Chunks:
        """One, of all rows, that is `missing`."""
        yield slice(0, None), _missing(self._sent)

    def copy(self, timeout: float | None = None) -> Reply:
        return _missing(self._sent)

    def cancel(self) -> None:
        """There is nothing to cancel."""


def _missing(sent: Sent) -> Reply:
    return Reply({}, sent.sequence, sent.step, None)
