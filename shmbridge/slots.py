"""How replies lie in their slots, whatever memory that is: the outputs of the offer one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch

from shmbridge import offer
from shmbridge.config import TorchDtype
from shmbridge.errors import AttachError
from shmbridge.offer import Extent, OutputSpec

View = Callable[[int, TorchDtype, tuple[int, ...]], torch.Tensor]
"""A tensor over the memory of all slots, from an offset in bytes, a dtype and its dimensions."""

_NONE = Extent(0, 0)


class Slots:
    """`count` reply slots of `stride` bytes, seen as the tensors of `outputs`."""

    def __init__(self, outputs: tuple[OutputSpec, ...], count: int, stride: int, view: View) -> None:
        self.count = count
        self._outputs = outputs
        self._stride = stride
        self._view = view
        self._cached: list[tuple[Extent, dict[str, torch.Tensor]]] = [(_NONE, {})] * count

    def views(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        """Every output of reply (or chunk) `number`, in place. The dict is not to be changed.

        Raises:
            AttachError: `extent` is larger than a slot: a garbled request.
        """
        slot = number % self.count
        cached, views = self._cached[slot]
        if cached == extent:
            return views
        places = offer.offsets(self._outputs, extent)
        if places[-1] > self._stride:
            raise AttachError(f"a reply for {extent} takes {places[-1]} bytes, its slot has {self._stride}: refused.")
        views = {
            spec.name: self._view(slot * self._stride + place, spec.dtype, spec.dims(extent))
            for spec, place in zip(self._outputs, places, strict=False)
        }
        self._cached[slot] = (extent, views)
        return views

    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None:
        """Copy `outputs`, in the offered dtype, into the reply from `position` (what has a sequence axis) and from `row`
        (what has none) on, without waiting for a GPU. An output that is not there is left as it is."""
        views = self.views(number, extent)
        for spec in self._outputs:
            source = outputs.get(spec.name)
            if source is None:
                continue
            target = views[spec.name]
            if source.shape != target.shape:
                target = _part(target, source, spec, position if spec.per_token else row)
            target.copy_(source, non_blocking=True)


def _part(target: torch.Tensor, source: torch.Tensor, spec: OutputSpec, at: int) -> torch.Tensor:
    """Where `source` goes in `target`. Positions lie in one or two leading axes of either, in row-major order."""
    if not spec.per_token:
        return target[at : at + source.shape[0]]
    rest = spec.shape[1:]
    flat = target.view(-1, *rest)  # type: ignore[arg-type]
    count = prod(source.shape[: source.ndim - len(rest)])
    return flat[at : at + count].view(source.shape)
