"""Reads a loader that accelerate prepared ahead of its loop, without accelerate noticing.

accelerate asks the loader itself whether the loop is at the end of an epoch: `end_of_dataloader` decides whether
`accumulate()` steps, and `remainder` how many rows `gather_for_metrics()` keeps of the last batch. The loader sets both in
next(), for the batch that next() returns. A reader that is three batches ahead would end the epoch three batches early.

So what next() changes is undone at once, and done again when the loop is given that batch. This holds for each loader that
the iterator draws from, also behind a progress bar or a generator, and for no other one: an evaluation's loader, say.

accelerate is used only where the process has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class LoaderState(NamedTuple):
    """What a prepared loader says about the batch that it returned last."""

    loader: Any
    end_of_dataloader: bool
    remainder: int
    position: dict[str, Any] | None  # its state_dict, where it is a StatefulDataLoader

    def differs(self, other: LoaderState | None) -> bool:
        """From `other` of the same loader; every next() of a StatefulDataLoader makes a new state_dict."""
        return other is None or self[1:3] != other[1:3] or self.position is not other.position

    def restore(self) -> None:
        """Make the loader say this."""
        self.loader.end_of_dataloader = self.end_of_dataloader
        self.loader.remainder = self.remainder
        if self.position is not None:
            self.loader.dl_state_dict = self.position


class ReadAhead:
    """next() of one iterator, for a loop that is given the batches later."""

    def __init__(self) -> None:
        self._loaders: list[Any] = []  # that the iterator draws from
        self._left: list[LoaderState] = []  # as the iterator left them
        self.at_end = False
        """The batch that was read last ends an epoch. accelerate takes the loader off its list in the next next()."""

    @property
    def collective(self) -> bool:
        """next() is a collective (dispatch_batches=True): every rank must call it as often between two other collectives."""
        return any(
            isinstance(each, sys.modules["accelerate.data_loader"].DataLoaderDispatcher) for each in self._loaders
        )

    def next(self, batches: Iterator[T]) -> tuple[T, list[LoaderState]]:
        """The next batch, and what is to be restored before the loop is given it. Raises what next() raises."""
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
        """The iterator draws from each loader that its next() registered or changed."""
        known = {id(state.loader): state for state in before}
        for place, state in enumerate(after):
            moved = place >= len(before) or state.differs(known.get(id(state.loader)))
            if moved and not self._draws_from(state):
                self._loaders.append(state.loader)

    def _draws_from(self, state: LoaderState) -> bool:
        return any(state.loader is each for each in self._loaders)


def _states() -> list[LoaderState]:
    """Of each loader that accelerate knows to be iterated over; the innermost loop's is the last."""
    module = sys.modules.get("accelerate.state")
    if module is None:
        return []
    return [
        LoaderState(loader, loader.end_of_dataloader, loader.remainder, getattr(loader, "dl_state_dict", None))
        for loader in module.GradientState().dataloader_references
        if loader is not None
    ]
