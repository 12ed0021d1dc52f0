"""A loader with the teacher ahead of it: batches are taken from it before their turn, and their requests are sent in order.

On a fixed data set this costs no staleness, because it is the same batch that the teacher saw. `ahead` batches are taken before
their turn, however many replies the ring has room for. Requests are sent in order as it has room: when the loop draws, when it
waits for a reply, and when it has read one. So the loop may draw any number of batches before it reads the first. What holds at
the edges:

    end of the loader     what was taken is handed out, then the iteration ends; the next epoch is a new prefetch
    the loader raises     the batches before it are handed out first, then its exception is raised, in its place
    a batch is refused    likewise
    break, or an error    what was taken and not handed out is cancelled: the teacher drops it, its slots are free again
      in the loop         (as soon as no variable holds the iterator; a `with` block does it at its end)

Other requests come first. Before a request of `submit`, `exchange` or another prefetch is sent, what this one has in the ring and
the loop has not waited for is withdrawn, and it is sent again when the loop draws or waits: slots come free in order, so the
request's slot would stay taken until the loop has read everything in front of it. The teacher computes a withdrawn request twice
if it had begun with it. Make such requests where the loop holds no lease: behind that one no slot comes free, and a full ring is
an error.
"""

from __future__ import annotations

import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from shmbridge.errors import RequestRefused, RingFull, ShmbridgeError
from shmbridge.integrations.accelerate import LoaderState, ReadAhead
from shmbridge.rank.in_flight import Requests
from shmbridge.rank.pending import Pending
from shmbridge.rank.request import UNSENT, Request

T = TypeVar("T")

Tokens = str | Callable[[T], Any] | None
_TAKEN = ("input_ids", "attention_mask", "position_ids")


class _Taken(NamedTuple):
    """A batch that was taken from the loader and not handed out, or what was raised in its place."""

    batch: Any
    state: Any
    loaders: list[LoaderState]
    pending: Pending | None
    error: Exception | None  # where there is no pending


class Prefetch(Iterator[tuple[T, Pending]], Generic[T]):
    """Made by `Bridge.prefetch`. An iterator, and a context manager that closes it.

    A Prefetch that is dropped, in whatever thread, is cancelled when the bridge is next used."""

    def __init__(
        self,
        requests: Requests,
        check: Callable[..., Request],
        batches: Iterable[T],
        tokens: Tokens[T],
        ahead: int,
        state: Callable[[], Any] | None,
    ) -> None:
        """`check` is the bridge's: from the arguments of `submit` to the request."""
        if ahead < 0:
            raise RequestRefused(f"ahead is {ahead}; 0 takes each batch in its turn.")
        self._requests = requests
        self._check = check
        self._queue = SendQueue(requests)
        self._batches: Iterator[T] | None = iter(batches)
        self._reading = ReadAhead()
        self._tokens = tokens
        self._ahead = ahead
        self._take_state = state
        self._taken: deque[_Taken] = deque()  # in order
        self.state: Any = None
        """What `state` of Bridge.prefetch gave when the batch that was handed out last was taken."""

    def __next__(self) -> tuple[T, Pending]:
        while True:
            self._requests.life.heed()
            self._queue.fill_ring()
            if len(self._taken) > self._ahead or not self._take():
                break
        first = self._taken.popleft() if self._taken else None
        if first and first.pending:
            self.state = first.state
            for loader in first.loaders:
                loader.restore()
            return first.batch, first.pending
        self.close()
        try:
            raise StopIteration if first is None or first.error is None else first.error
        finally:
            del first  # the traceback holds this frame

    def _take(self) -> bool:
        """Take a batch from the loader, or what it raises. False where it is at its end or may not be asked yet."""
        if self._batches is None or (self._taken and self._reading.at_end):
            return False
        try:
            batch, loaders = self._reading.next(self._batches)
            state = self._take_state() if self._take_state else None
        except Exception as error:
            self._batches = None
            if not isinstance(error, StopIteration):
                self._taken.append(_Taken(None, None, [], None, _without_frames(error)))
            return False
        pending, refused = None, None
        try:
            request = self._check(**self._arguments(batch))
            self._queue.add(request)
            pending = Pending(self._requests, request)
        except Exception as error:
            refused = _without_frames(error)
        self._taken.append(_Taken(batch, state, loaders, pending, refused))
        return True

    def _arguments(self, batch: T) -> dict[str, Any]:
        """The arguments of `submit`."""
        tokens = self._tokens
        if callable(tokens):
            found = tokens(batch)
            return dict(found) if isinstance(found, Mapping) else {"input_ids": found}
        if isinstance(batch, Mapping):
            names = (tokens,) if tokens else _TAKEN
            if names[0] not in batch:
                raise RequestRefused(f"the batch has {sorted(map(str, batch))}; expected {names[0]!r}. Give tokens=...")
            found = {name: batch[name] for name in names if name in batch}
            return {"input_ids": found[names[0]]} if tokens else found
        if tokens or isinstance(batch, (list, tuple)):
            raise RequestRefused(
                f"the batch is a {type(batch).__name__}; tokens is {tokens!r}: give a function from the batch to its token IDs, "
                "such as tokens=lambda batch: batch[0]."
            )
        return {"input_ids": batch}

    def close(self) -> None:
        """Cancel what was not handed out; the iteration ends. What was handed out may still be waited for. Once is enough; more
        does nothing."""
        self._batches = None
        for taken in self._taken:
            if taken.pending:
                taken.pending.cancel()
        self._taken.clear()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _without_frames(error: Exception) -> Exception:
    """`error` with its traceback as a note. Its frames refer to the Prefetch that keeps it, and to the loop's: such a cycle
    would keep slots and tensors where no collector runs."""
    if not isinstance(error, ShmbridgeError):  # ours says all in its message
        error.add_note("while the teacher was ahead of the loop:\n" + "".join(traceback.format_exception(error)))
    seen: set[int] = set()  # `raise error from error` is a circle
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


class SendQueue:
    """The requests of a prefetch that nobody waited for yet, in order; the ring has as many of the first as it has room for.

    Each Request is referred to weakly: its Pending keeps it, and one whose Pending is dropped is neither sent nor kept.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._all: list[weakref.ref[Request]] = []

    def add(self, request: Request) -> None:
        """Append a request, which is not sent yet. Its buffers are copied: the caller may change its tensors."""
        request.own_buffers()
        request.queue = self
        self._all.append(weakref.ref(request))

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
        request.queue = None
        request.drop_buffers()
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
