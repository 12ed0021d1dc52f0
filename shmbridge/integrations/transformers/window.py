"""The micro-batches that the teacher was asked about, from the loader to their turn in Trainer's loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shmbridge import Bridge, Pending, Prefetch
from shmbridge.losses import mask_from_labels

Batch = Mapping[str, Any]


class Turn(NamedTuple):
    """A micro-batch whose request is the next to be read."""

    pending: Pending
    rows: Tensor
    """(n,) int64 on the CPU: the positions whose distribution was asked for, counted over (batch, seq)."""


class Window:
    """The micro-batches of one optimizer step, with those of the next one ahead of them."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._loader: Iterator[Batch] | None = None  # the epoch's iterator that `_ahead` reads
        self._ahead: Prefetch[Batch] | None = None
        self._drawn: dict[int, tuple[Batch, Pending]] = {}  # by the batch's id, until its turn

    def draw(self, loader: Iterator[Batch], batches: int, ahead: int, step: int) -> list[Batch]:
        """Take the next `batches` micro-batches, and `ahead` more of those that follow, and send their requests as the ring has room.

        Args:
            loader: the epoch's iterator. Another one than before cancels what is ahead of the earlier one.
            step: the optimizer step that the micro-batches belong to.
        """
        if self._ahead is None or self._loader is not loader:
            self.close()
            taken = count()
            self._loader = loader
            self._ahead = self._bridge.prefetch(
                loader, lambda batch: _request(batch, step + next(taken) // batches), ahead=ahead
            )
        self._cancel_drawn()
        drawn = list(islice(self._ahead, batches))
        self._drawn = {id(batch): (batch, pending) for batch, pending in drawn}
        return [batch for batch, _ in drawn]

    def turn(self, batch: Batch, step: int) -> Turn:
        """The request of a micro-batch that was drawn; of any other batch, a request that is sent now."""
        found = self._drawn.pop(id(batch), None)
        pending = found[1] if found else self._bridge.submit(**_request(batch, step))
        return Turn(pending, _rows(batch).flatten().nonzero().squeeze(-1).cpu())

    def close(self) -> None:
        """Cancel what was asked and did not have its turn."""
        if self._ahead is not None:
            self._ahead.close()
        self._loader = self._ahead = None
        self._cancel_drawn()

    def _cancel_drawn(self) -> None:
        for _, pending in self._drawn.values():
            pending.cancel()
        self._drawn = {}


def _request(batch: Batch, step: int) -> dict[str, Any]:
    """The arguments of Bridge.submit: only the rows whose label counts are asked for."""
    names = ("input_ids", "attention_mask", "position_ids")
    found = {name: batch[name] for name in names if batch.get(name) is not None}
    return {**found, "positions": _rows(batch), "step": step}


def _rows(batch: Batch) -> Tensor:
    """(batch, seq) bool: the positions whose next token has a label; without labels, those that the attention mask lets in."""
    if batch.get("shift_labels") is not None:
        return mask_from_labels(batch["shift_labels"], shifted=True)
    if batch.get("labels") is not None:
        return mask_from_labels(batch["labels"], shifted=False)
    if batch.get("attention_mask") is not None:
        mask: Tensor = batch["attention_mask"] != 0
        return mask
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)
