"""What server and bridge know of a plane: where the bytes of a reply lie, and how they come there, is its own affair.

Cursors, heads and doorbells are the same for all planes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from shmbridge.output_spec import Extent
from shmbridge.shm.process import Identity


class TeacherPlane(Protocol):
    """The reply slots of one lane as the teacher fills them. `number` is a sequence, or a chunk's where replies are streamed;
    its slot is free when it is written."""

    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None: ...

    def seal(self, number: int) -> Callable[[], None] | None: ...

    def settled(self) -> bool: ...


class RankPlane(Protocol):
    """The reply slots of one lane as its rank reads them."""

    timed: bool
    """Set by whoever reads `stalled_s`; else a GPU takes no time of its waits."""

    @property
    def keeps(self) -> bool:
        """The slot of a reply is wanted until `release`; else it is free as soon as `read` has returned."""

    @property
    def lends(self) -> bool:
        """The tensors of a reply lie in its slot; else they are the rank's own."""

    def read(self, number: int, extent: Extent) -> dict[str, torch.Tensor]: ...

    def release(self, number: int) -> int | None:
        """The slot may be written again. The version of its lent tensors until now (see Slots.take_back); None: none were lent."""

    def stalled_s(self) -> float: ...

    def teachers(self) -> tuple[Identity, ...]:
        """The processes whose GPU memory this rank's GPU may read."""

    def waits_for(self) -> Identity | None:
        """The teacher's process whose reply this rank's GPU still waits for, or reads: of the oldest such reply. Makes no call of
        CUDA; any thread may ask."""

    def stands_at(self) -> tuple[Identity, int] | None:
        """The read that this rank's GPU has come to and not got past: the teacher's process, and the reply's number. While the
        host opens a teacher's memory, the first reply in it. None while the GPU is still at work that was launched before.
        Makes no call of CUDA; any thread may ask."""

    def check(self) -> None: ...
