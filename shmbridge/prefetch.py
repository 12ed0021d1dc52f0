"""A loader with the teacher ahead of it: each batch is handed out after the next ones were submitted.

On a fixed data set this costs no staleness, because it is the same batch that the teacher saw. What holds at the edges:

    end of the loader     what was submitted is handed out, then the iteration ends; the next epoch is a new prefetch
    the loader raises     the batches before it are handed out first, then its exception is raised, in its place
    a batch is refused    likewise
    break, or an error    what was submitted and not handed out is cancelled: the teacher drops it, its slots are free again
      in the loop         (as soon as no variable holds the iterator; a `with` block does it at its end)

Other requests come first. Before a request of `submit`, `exchange` or another prefetch is sent, what was submitted ahead is
withdrawn, and it is submitted again before its turn: slots come free in order, so the request's slot would stay taken until the
loop has read everything in front of it. The teacher computes a withdrawn request twice if it had begun with it. Make such
requests where the loop holds no reply that is still to be read: behind that one no slot comes free, and a full ring is an error.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

from shmbridge.errors import RequestRefused, ShmbridgeError
from shmbridge.integrations.accelerate import LoaderState, ReadAhead
from shmbridge.pending import Pending

T = TypeVar("T")

Tokens = str | Callable[[T], Any] | None
_TAKEN = ("input_ids", "attention_mask", "position_ids")


@dataclass(slots=True)
class _Taken(Generic[T]):
    """A batch that was taken from the loader and not handed out."""

    batch: T
    state: Any
    loaders: list[LoaderState]
    request: dict[str, Any] = field(default_factory=dict)  # the arguments of `submit`
    pending: Pending | None = None  # None: still to be submitted, or withdrawn
    error: Exception | None = None  # why it cannot be submitted


class Prefetch(Iterator[tuple[T, Pending]], Generic[T]):
    """Made by `Bridge.prefetch`. An iterator, and a context manager that closes it.

    A Prefetch that is dropped is cancelled when the bridge is next used: each Pending notes that it was dropped, in whatever
    thread that happens, and no cursor moves there."""

    def __init__(
        self,
        submit: Callable[..., Pending],
        free_slots: Callable[[], int],
        batches: Iterable[T],
        tokens: Tokens[T],
        ahead: int,
        state: Callable[[], Any] | None,
    ) -> None:
        """`submit` is the bridge's, with the Prefetch that asks as its first argument."""
        if ahead < 0:
            raise RequestRefused(f"ahead is {ahead}; 0 submits each batch in its turn.")
        self._submit = submit
        self._free_slots = free_slots
        self._batches: Iterator[T] | None = iter(batches)
        self._reading = ReadAhead()
        self._tokens = tokens
        self._ahead = ahead
        self._take_state = state
        self._taken: deque[_Taken[T]] = deque()  # in order; the first `_submitted` of them have a pending
        self._submitted = 0
        self._error: Exception | None = None  # of the loader, behind what was taken
        self.state: Any = None
        """What `state` of Bridge.prefetch gave when the batch that was handed out last was taken."""

    def __next__(self) -> tuple[T, Pending]:
        self._fill()
        first = self._taken[0] if self._taken else None
        if first and first.pending:
            self._taken.popleft()
            self._submitted -= 1
            self.state = first.state
            for loader in first.loaders:
                loader.restore()
            return first.batch, first.pending
        error = first.error if first else self._error
        self.close()
        try:
            raise error or StopIteration
        finally:
            del error, first  # the traceback holds this frame

    def _fill(self) -> None:
        """Submit the loop's own batch, then up to `ahead` more while the ring has room."""
        while self._has_room() and (self._submitted < len(self._taken) or self._take()):
            following = self._taken[self._submitted]
            if following.error:
                break
            try:
                following.pending = self._submit(self, **following.request)
            except Exception as error:
                following.error = _without_frames(error)
                break
            self._submitted += 1
        # Where taking is a collective, every rank must take the same number in each call, whatever its ring has room for.
        while self._reading.collective and len(self._taken) <= self._ahead and self._take():
            pass

    def _has_room(self) -> bool:
        """For one more; the loop's own batch is submitted even where the ring will refuse it."""
        if not self._submitted:
            return True
        return self._submitted <= self._ahead and self._free_slots() > 0

    def _take(self) -> bool:
        """Take a batch from the loader, and make a request of it. False where it is at its end, has raised, or may not be asked yet."""
        if self._batches is None or (self._taken and self._reading.at_end):
            return False
        try:
            batch, loaders = self._reading.next(self._batches)
            state = self._take_state() if self._take_state else None
        except Exception as error:
            self._batches = None
            if not isinstance(error, StopIteration):
                self._error = _without_frames(error)
            return False
        taken = _Taken(batch, state, loaders)
        try:
            taken.request = self._request(batch)
        except Exception as error:
            taken.error = _without_frames(error)
        self._taken.append(taken)
        return True

    def withdraw(self) -> None:
        """Cancel what was submitted ahead; it is submitted again before its turn."""
        self._submitted = 0
        for taken in self._taken:
            if taken.pending:
                taken.pending.cancel()
                taken.pending = None

    def _request(self, batch: T) -> dict[str, Any]:
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
        """Cancel what was submitted and not handed out; the iteration ends. Once is enough; more does nothing."""
        self._batches = None
        self._error = None
        self.withdraw()
        self._taken.clear()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
