"""Reading ahead of a loop over a loader that accelerate prepared.

accelerate asks the loader whether the loop is at the end of an epoch: `end_of_dataloader` decides whether
`accumulate()` steps, and `remainder` how many rows `gather_for_metrics()` keeps of the last batch. The loader sets both
in next(), for the batch that next() returns. A reader that is three batches ahead would therefore end the epoch three
batches early.

So the loader's state is kept with each batch that next() returns, the loop's state is put back, and the batch's state
is restored when the loop is given the batch. This is done for every loader that the iterator draws from, also behind a
progress bar or a generator, and for no other loader, such as that of an evaluation inside the loop.

accelerate is not imported here; it is used only if the process has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class LoaderState(NamedTuple):
    """The attributes of a prepared loader that belong to one batch."""

    loader: Any
    end_of_dataloader: bool
    remainder: int
    position: dict[str, Any] | None  # its state_dict, where it is a StatefulDataLoader

    def differs(self, other: LoaderState | None) -> bool:
        """Whether this state is not `other`, of the same loader. Every next() of a StatefulDataLoader makes a new
        state_dict."""
        return other is None or self[1:3] != other[1:3] or self.position is not other.position

    def restore(self) -> None:
        """Set the loader's attributes to this state."""
        self.loader.end_of_dataloader = self.end_of_dataloader
        self.loader.remainder = self.remainder
        if self.position is not None:
            self.loader.dl_state_dict = self.position


class ReadAhead:
    """Reads one iterator ahead of its loop."""

    def __init__(self) -> None:
        self._loaders: list[Any] = []  # those that the iterator draws from
        self._left: list[LoaderState] = []  # their states when next() returned last
        self.at_end = False
        """Whether the batch that was read last ends an epoch. Another next() would take the loader off accelerate's list."""

    def next(self, batches: Iterator[T]) -> tuple[T, list[LoaderState]]:
        """The next batch, and the states to restore when the loop is given it. Raises what next() raises."""
        seen_by_loop = _states()
        for state in self._left:
            state.restore()
        before = _states()
        try:
            batch = next(batches)
            after = _states()
            self._find_loaders(before, after)
        finally:
            for state in seen_by_loop:
                if self._draws_from(state):
                    state.restore()
        self._left = [state for state in after if self._draws_from(state)]
        self.at_end = any(state.end_of_dataloader for state in self._left)
        return batch, self._left

    def _find_loaders(self, before: list[LoaderState], after: list[LoaderState]) -> None:
        """Note the loaders that next() registered or changed: the iterator draws from them."""
        known = {id(state.loader): state for state in before}
        for place, state in enumerate(after):
            moved = place >= len(before) or state.differs(known.get(id(state.loader)))
            if moved and not self._draws_from(state):
                self._loaders.append(state.loader)

    def _draws_from(self, state: LoaderState) -> bool:
        return any(state.loader is each for each in self._loaders)


def _states() -> list[LoaderState]:
    """The state of each loader on accelerate's list; the last one is the innermost loop's."""
    module = sys.modules.get("accelerate.state")
    if module is None:
        return []
    return [
        LoaderState(loader, loader.end_of_dataloader, loader.remainder, getattr(loader, "dl_state_dict", None))
        for loader in module.GradientState().dataloader_references
        if loader is not None
    ]
