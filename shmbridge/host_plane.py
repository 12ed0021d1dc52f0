"""The host plane: replies in POSIX shared memory, written by the teacher and read in place by the rank.

A plane is what differs between host memory and GPU memory, and nothing else: where the bytes of a reply slot lie and how
they are copied. Cursors, heads and doorbells are the same for all planes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shmbridge import layout, offer, payload
from shmbridge.errors import AttachError
from shmbridge.offer import Offer
from shmbridge.segment import Segment
from shmbridge.session import Names, Shape, Token


class HostPlane:
    """The reply slots of one lane."""

    def __init__(self, token: Token, shape: Shape, lane: int, agreed: Offer) -> None:
        """Attach the lane's reply segment. Raises AttachError."""
        self._outputs = agreed.outputs
        self._depth = shape.depth
        self._stride = offer.slot_bytes(agreed.outputs, shape.max_tokens, shape.max_batch)
        name = Names(token.session_id).reply(token.generation, lane)
        segment = Segment.attach(name, layout.REPLY, token.session_id, token.generation, lane)
        expected = layout.reply_bytes(shape.depth, self._stride)
        if segment.bytes.nbytes != expected:
            raise AttachError(
                f"segment {name} has {segment.bytes.nbytes} bytes, the teacher's offer takes {expected}: garbled."
            )
        self._memory = segment.bytes
        self._cached: list[tuple[int, int, dict[str, torch.Tensor]]] = [(0, 0, {})] * shape.depth

    def views(self, sequence: int, batch: int, seq: int) -> dict[str, torch.Tensor]:
        """Every output of a (batch, seq) reply, in place. The dict is the plane's own: not to be changed."""
        slot = sequence % self._depth
        cached = self._cached[slot]
        if cached[0] == batch and cached[1] == seq:
            return cached[2]
        start = layout.PAGE + slot * self._stride
        places = offer.offsets(self._outputs, batch, seq)
        assert places[-1] <= self._stride, "a request larger than the ring takes"
        views = {
            spec.name: payload.view(self._memory, start + place, spec, batch, seq)
            for spec, place in zip(self._outputs, places, strict=False)
        }
        self._cached[slot] = (batch, seq, views)
        return views

    def write(
        self, sequence: int, batch: int, seq: int, at: int, outputs: Mapping[str, torch.Tensor], rows: slice
    ) -> None:
        """Teacher: copy `rows` of a combined forward's outputs to row `at` of the reply, in the offered dtype."""
        views = self.views(sequence, batch, seq)
        count = rows.stop - rows.start
        for spec in self._outputs:
            source, target = outputs[spec.name], views[spec.name]
            if count != source.shape[0]:
                source = source[rows]
            if spec.per_token and source.shape[1] != seq:
                source = source[:, :seq]
            if count != batch:
                target = target[at : at + count]
            target.copy_(source)

    def read(self, sequence: int, batch: int, seq: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Rank: the reply's tensors; in place on the CPU, copied to any other `device`."""
        views = self.views(sequence, batch, seq)
        if device.type == "cpu":
            return {name: tensor.detach() for name, tensor in views.items()}
        return {name: tensor.to(device) for name, tensor in views.items()}
