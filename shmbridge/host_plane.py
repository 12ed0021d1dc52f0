"""The host plane: replies in POSIX shared memory, written by the teacher and read in place by the rank.

A plane is what differs between host memory and GPU memory, and nothing else: where the bytes of a reply slot lie and how
they are copied. Cursors, heads and doorbells are the same for all planes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from shmbridge import layout, offer, payload
from shmbridge.errors import AttachError
from shmbridge.offer import Extent, Offer, OutputSpec
from shmbridge.segment import Segment
from shmbridge.session import Names, Shape, Token

_NONE = Extent(0, 0)


class HostPlane:
    """The reply slots of one lane: one for each slot of its ring, or one for each chunk."""

    def __init__(self, token: Token, shape: Shape, lane: int, agreed: Offer) -> None:
        """Attach the lane's reply segment. Raises AttachError."""
        self._outputs = agreed.outputs
        self._slots = shape.reply_slots
        self._stride = shape.slot_bytes(agreed.outputs)
        name = Names(token.session_id).reply(token.generation, lane)
        segment = Segment.attach(name, layout.REPLY, token.session_id, token.generation, lane)
        expected = shape.reply_bytes(agreed.outputs)
        if segment.bytes.nbytes != expected:
            raise AttachError(
                f"segment {name} has {segment.bytes.nbytes} bytes, the teacher's offer takes {expected}: garbled."
            )
        self._memory = segment.bytes
        self._cached: list[tuple[Extent, dict[str, torch.Tensor]]] = [(_NONE, {})] * self._slots

    def views(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        """Every output of reply (or chunk) `number`, in place. The dict is the plane's own: not to be changed."""
        slot = number % self._slots
        cached, views = self._cached[slot]
        if cached == extent:
            return views
        start = layout.PAGE + slot * self._stride
        places = offer.offsets(self._outputs, extent)
        assert places[-1] <= self._stride, "a request larger than the ring takes"
        views = {
            spec.name: payload.view(self._memory, start + place, spec, extent)
            for spec, place in zip(self._outputs, places, strict=False)
        }
        self._cached[slot] = (extent, views)
        return views

    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None:
        """Teacher: copy `outputs`, in the offered dtype, into the reply from `position` (what has a sequence axis) and
        from `row` (what has none) on. An output that is not there is left as it is."""
        views = self.views(number, extent)
        for spec in self._outputs:
            source = outputs.get(spec.name)
            if source is None:
                continue
            target = views[spec.name]
            if source.shape != target.shape:
                target = _part(target, source, spec, position if spec.per_token else row)
            target.copy_(source)

    def read(self, number: int, extent: Extent, device: torch.device) -> dict[str, torch.Tensor]:
        """Rank: the reply's tensors; in place on the CPU, copied to any other `device`."""
        views = self.views(number, extent)
        if device.type == "cpu":
            return {name: tensor.detach() for name, tensor in views.items()}
        return {name: tensor.to(device) for name, tensor in views.items()}


def _part(target: torch.Tensor, source: torch.Tensor, spec: OutputSpec, at: int) -> torch.Tensor:
    """Where `source` goes in `target`. Positions lie in one or two leading axes of either, in row-major order."""
    if not spec.per_token:
        return target[at : at + source.shape[0]]
    rest = spec.shape[1:]
    flat = target.view(-1, *rest)  # type: ignore[arg-type]
    count = prod(source.shape[: source.ndim - len(rest)])
    return flat[at : at + count].view(source.shape)
