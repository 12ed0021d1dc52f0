"""A loader with the teacher ahead of it: each batch is handed out after the next ones were submitted.

On a fixed data set this costs no staleness, because it is the same batch that the teacher saw. What holds at the edges:

    end of the loader     what was submitted is handed out, then the iteration ends; the next epoch is a new prefetch
    the loader raises     the batches before it are handed out first, then its exception is raised, in its place
    a batch is refused    likewise
    break, or an error    what was submitted and not handed out is cancelled: the teacher drops it, its slots are free again
      in the loop

Evaluation in the middle of the loop, with `exchange` or a prefetch of its own, takes the slots that are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from shmbridge.errors import RequestRefused
from shmbridge.pending import Pending

T = TypeVar("T")

Tokens = str | Callable[[T], Any] | None
_TAKEN = ("input_ids", "attention_mask", "position_ids")


class _Submitted(NamedTuple, Generic[T]):
    batch: T
    pending: Pending
    state: Any


class Prefetch(Iterator[tuple[T, Pending]], Generic[T]):
    """Made by `Bridge.prefetch`. An iterator, and a context manager that closes it."""

    def __init__(
        self,
        submit: Callable[..., Pending],
        free_slots: Callable[[], int],
        batches: Iterable[T],
        tokens: Tokens[T],
        ahead: int,
        state: Callable[[], Any] | None,
    ) -> None:
        if ahead < 0:
            raise RequestRefused(f"ahead is {ahead}; 0 submits each batch in its turn.")
        self._submit = submit
        self._free_slots = free_slots
        self._batches: Iterator[T] | None = iter(batches)
        self._tokens = tokens
        self._ahead = ahead
        self._take_state = state
        self._submitted: deque[_Submitted[T]] = deque()
        self._error: Exception | None = None
        self.state: Any = None
        """What `state` of Bridge.prefetch gave when the batch that was handed out last was taken."""

    def __next__(self) -> tuple[T, Pending]:
        while self._batches is not None and self._has_room():
            self._submit_next()
        if self._submitted:
            batch, pending, self.state = self._submitted.popleft()
            return batch, pending
        error, self._error = self._error, None
        raise error or StopIteration

    def _has_room(self) -> bool:
        """For one more; the loop's own batch is submitted even where the ring will refuse it."""
        if not self._submitted:
            return True
        return len(self._submitted) <= self._ahead and self._free_slots() > 0

    def _submit_next(self) -> None:
        assert self._batches is not None
        try:
            batch = next(self._batches)
            state = self._take_state() if self._take_state else None
            self._submitted.append(_Submitted(batch, self._submit(**self._request(batch)), state))
        except StopIteration:
            self._batches = None
        except Exception as error:  # raised in its turn
            self._error = error
            self._batches = None

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
        while self._submitted:
            self._submitted.pop().pending.cancel()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_submitted"):
            self.close()
