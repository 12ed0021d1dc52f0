"""The interface of a plane: how the teacher's server writes a reply, and how a rank's bridge reads it.

Cursors, heads and doorbells are the same for every plane. A plane knows only where the tensors of a reply lie and how they get
there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import tensors
from shmbridge.plane.tensors import Slots
from shmbridge.shm import layout
from shmbridge.shm.process import Identity
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Lane, Names, Shape, Token


class LaneSpec(NamedTuple):
    """What either side knows of a lane before there is a reply in it."""

    token: Token
    shape: Shape
    lane: Lane
    agreed: Offer
    device: torch.device  # of this process

    @property
    def stride(self) -> int:
        """Bytes of a reply slot."""
        return self.shape.slot_bytes(self.agreed.outputs)

    def attach(self, nbytes: int) -> Segment:
        """The lane's reply segment, of `nbytes` bytes. Raises AttachError."""
        session, generation, lane = self.token.session_id, self.token.generation, self.lane.index
        name = Names(session).reply(generation, lane)
        return tensors.attach(name, layout.REPLY, nbytes, session, generation, lane)

    def slots(self, memory: torch.Tensor) -> Slots:
        """The lane's reply slots in `memory`: (bytes,) uint8, at least all slots."""
        return Slots(self.agreed.outputs, self.shape.reply_slots, self.stride, memory)


class TeacherPlane(ABC):
    """The reply slots of one lane as the teacher fills them.

    `number` is the sequence of a request, or the number of a chunk where replies are streamed. Its slot is free when it is
    written.
    """

    @abstractmethod
    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None:
        """Copy `outputs` into the reply, from `position` and `row` on: see Slots.write. On a GPU the copy is only launched."""

    @abstractmethod
    def seal(self, number: int) -> Callable[[], None] | None:
        """End the reply: it is not written any more. It may be published at once (None), or when the function that is returned
        has come back."""

    def settled(self) -> bool:
        """Whether this process may end: nothing that was published is lost with it. Never blocks."""
        return True


class RankPlane(ABC):
    """The reply slots of one lane as its rank reads them. What this class says of a GPU is true of replies in host memory: a reply
    is published once it is complete, so there is nothing to wait for."""

    keeps: bool
    """Whether the slot of a reply is needed until `release`; else it is free as soon as `read` has returned."""

    lends: bool
    """Whether the tensors of a reply lie in its slot; else they are the rank's own."""

    timed = False
    """Whether to take the time of a GPU's waits, for `stalled_s`."""

    @abstractmethod
    def read(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        """The tensors of a published reply, on the rank's device; on a GPU for its current stream.

        Raises:
            AttachError: `extent` is larger than a slot, or the teacher's memory cannot be opened.
            TornReply: an earlier reply turned out to be torn.
        """

    @abstractmethod
    def release(self, number: int) -> int | None:
        """End the use of a reply before its slot is given back. Returns the version of its lent tensors until now (see
        Slots.take_back), or None where none were lent."""

    def stalled_s(self) -> float:
        """Seconds that this rank's GPU has waited for replies since the last call; only waits that are over count."""
        return 0.0

    def teachers(self) -> tuple[Identity, ...]:
        """The processes whose GPU memory this rank's GPU may read."""
        return ()

    def waits_for(self) -> Identity | None:
        """The process that makes the oldest reply which this rank's GPU still waits for, or reads. Makes no call of CUDA; any
        thread may call it."""
        return None

    def stands_at(self) -> tuple[Identity, int] | None:
        """The read that this rank's GPU has reached and not finished: the teacher's process, and the reply's number. While the
        host opens a teacher's memory, the first reply in it. None while the GPU is busy with earlier work. Makes no call of CUDA;
        any thread may call it."""
        return None

    def check(self) -> None:  # noqa: B027
        """Look at the replies that the GPU has read, without waiting. Raises TornReply."""
