"""The micro-batches whose requests were sent ahead, from the loader to their turn in Trainer's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shmbridge import Bridge, Pending, Prefetch
from shmbridge.losses import mask_from_labels

Batch = Mapping[str, Any]


class Place(NamedTuple):
    """When a micro-batch has its turn."""

    step: int
    """The optimizer step, from 0."""
    micro_batch: int
    """In its step, from 0."""


class MicroBatch(NamedTuple):
    """A batch of the loader as the student and the teacher see it."""

    batch: Batch
    candidates: Tensor | None = None
    """(batch, seq, c) int64 on the CPU: the words whose log-probabilities the teacher is asked for."""
    sampled: bool = False
    """Whether its completions were drawn from the student."""


Prepare = Callable[[Batch, Place | None], MicroBatch]
"""From a batch of the loader to its micro-batch. The place is None for a batch of an evaluation."""


class Turn(NamedTuple):
    """A micro-batch whose request is the next to be read."""

    pending: Pending
    rows: Tensor
    """(n,) int64 on the CPU: the positions whose distribution was asked for, counted over (batch, seq)."""
    candidates: Tensor | None
    """(n, c) int64 on the CPU: MicroBatch.candidates of these rows."""
    sampled: bool


class Window:
    """The micro-batches of one optimizer step, and those of the next one ahead of them."""

    def __init__(self, bridge: Bridge, prepare: Prepare) -> None:
        self._bridge = bridge
        self._prepare = prepare
        self._loader: Iterator[Batch] | None = None  # the epoch's iterator that `_ahead` reads
        self._ahead: Prefetch[tuple[MicroBatch, int]] | None = None
        self._drawn: dict[int, tuple[MicroBatch, Pending]] = {}  # by the batch's id, until its turn

    def draw(self, loader: Iterator[Batch], batches: int, ahead: int, step: int) -> list[Batch]:
        """Take the next `batches` micro-batches, and `ahead` more of those that follow, and send their requests as the
        ring has room.

        Args:
            loader: the epoch's iterator. A new one cancels what was drawn ahead from the old one.
            step: the optimizer step that the micro-batches belong to.
        """
        if self._ahead is None or self._loader is not loader:
            self.close()
            self._loader = loader
            prepared = self._prepared(loader, step, batches)
            self._ahead = self._bridge.prefetch(prepared, lambda found: _request(*found), ahead=ahead)
        self._cancel_drawn()
        drawn = [(found, pending) for (found, _), pending in islice(self._ahead, batches)]
        self._drawn = {id(found.batch): (found, pending) for found, pending in drawn}
        return [found.batch for found, _ in drawn]

    def turn(self, batch: Batch, step: int) -> Turn:
        """The request of a micro-batch that was drawn. For any other batch a request is sent now."""
        drawn = self._drawn.pop(id(batch), None)
        if drawn:
            found, pending = drawn
        else:
            found = self._prepare(batch, None)
            pending = self._bridge.submit(**_request(found, step))
        rows = _rows(found.batch).flatten().nonzero().squeeze(-1).cpu()
        candidates = None if found.candidates is None else found.candidates.flatten(0, 1)[rows]
        return Turn(pending, rows, candidates, found.sampled)

    def close(self) -> None:
        """Cancel the requests that have not been read."""
        if self._ahead is not None:
            self._ahead.close()
        self._loader = self._ahead = None
        self._cancel_drawn()

    def _prepared(self, loader: Iterator[Batch], step: int, batches: int) -> Iterator[tuple[MicroBatch, int]]:
        """The micro-batches of the loader, each with its optimizer step."""
        for number, batch in enumerate(loader):
            place = Place(step + number // batches, number % batches)
            yield self._prepare(batch, place), place.step

    def _cancel_drawn(self) -> None:
        for _, pending in self._drawn.values():
            pending.cancel()
        self._drawn = {}


def _request(found: MicroBatch, step: int) -> dict[str, Any]:
    """The arguments of Bridge.submit: only rows whose label counts are requested."""
    names = ("input_ids", "attention_mask", "position_ids")
    request = {name: found.batch[name] for name in names if found.batch.get(name) is not None}
    request |= {"positions": _rows(found.batch), "step": step}
    return request if found.candidates is None else {**request, "candidates": found.candidates}


def _rows(batch: Batch) -> Tensor:
    """(batch, seq) bool: the positions whose next token has a label; without labels, those that the attention mask
    includes."""
    if batch.get("shift_labels") is not None:
        return mask_from_labels(batch["shift_labels"], shifted=True)
    if batch.get("labels") is not None:
        return mask_from_labels(batch["labels"], shifted=False)
    if batch.get("attention_mask") is not None:
        mask: Tensor = batch["attention_mask"] != 0
        return mask
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)
