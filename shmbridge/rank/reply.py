"""What the teacher answered: Reply as the loop reads it, Replies as they are read from the plane."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import NamedTuple, NoReturn

import torch

from shmbridge.errors import AttachError, Closed
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import select
from shmbridge.plane.base import RankPlane
from shmbridge.rank.device import Watchdog, choose
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.ring import Composition

_GPU_LOOK_S = 0.001
_EXPLAINED = 256  # ended leases and chunks of which an error can tell the sequence
_CHANGED = re.compile(r"is at version \d+; expected version (\d+)")  # autograd, of a saved tensor


class Reply:
    """What the teacher answered: named tensors with the axes (batch, seq) in front, (batch, seq, vocab) for `logits`; with
    (positions,) in their place where the request chose positions, and in a chunk.

    `missing` is True where there is no answer, because the bridge is off or the teacher is lost; there are no tensors then.
    `composition` tells where the request stood in the teacher's forward, which the bits of the reply depend on; None in a chunk.

    Where the tensors are lent (a lease or a chunk on the CPU, or with cuda.read=in_place), they lie in memory that the teacher
    writes again once the lease or the chunk has ended. A backward that needs a lent tensor, a view of it or a detach() of it
    after that raises a RuntimeError of autograd, and Bridge adds a note with the sequence and the remedy. A variable that
    merely outlives the block does no harm. What autograd does not save it cannot watch: reading such a variable after the
    block, a tensor that a checkpointed function takes from its closure, an attribute of `ctx` in an autograd function of
    your own (use ctx.save_for_backward), `.data`, `.numpy()`, DLPack and raw pointers. Use pending.copy() for these.
    """

    __slots__ = ("__weakref__", "_lent", "_released", "_tensors", "composition", "missing", "sequence", "step")

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        sequence: int,
        step: int | None,
        composition: Composition | None,
        *,
        lent: bool = False,
    ) -> None:
        """`lent`: the tensors lie in a slot."""
        self.sequence = sequence
        self._lent = lent
        self._tensors = tensors
        self._released = False
        self.missing = not tensors
        self.step = step
        self.composition = composition

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def logits(self) -> torch.Tensor:
        """(batch, seq, vocab); row i is the distribution after token i."""
        return self["logits"]

    @property
    def hidden(self) -> torch.Tensor:
        """(batch, seq, width) in the model's dtype; bridge.head(reply.hidden) gives the logits."""
        return self["hidden"]

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._released:
            raise Closed(f"the lease on sequence {self.sequence} was released; use the reply inside its `with` block.")
        if name not in self._tensors:
            raise KeyError(self._why_not(name))
        return self._tensors[name]

    def _why_not(self, name: str) -> str:
        """Why there is no tensor `name`, and the remedy."""
        if self.missing:
            return (
                f"the reply has no {name!r}: it is missing, because the bridge is off or the teacher is lost; look at "
                "reply.missing first and use the script's own loss then, as scripts/example.py does"
            )
        told = f"the reply has no {name!r}; it has {', '.join(self._tensors)}"
        if name == "logits" and "hidden" in self:
            return f"{told}; with payload.hidden={{}} read LazyLogits(reply.hidden, bridge.head)"
        return f"{told}; set payload.hidden={{}}" if name == "hidden" else told

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def owned(self) -> Reply:
        """The same reply outside of any lease."""
        owned = {name: tensor.clone() if self._lent else tensor for name, tensor in self._tensors.items()}
        return Reply(owned, self.sequence, self.step, self.composition)

    def forget(self) -> None:
        """The tensors are not to be read any more."""
        self._tensors = {}
        self._released = True


class Lent(NamedTuple):
    """The request whose reply, or chunk, was lent."""

    sequence: int
    step: int | None


class Replies:
    """Reads the replies of one bridge. A `number` is a sequence, or the number of a chunk where replies are streamed."""

    def __init__(self, session: RankSession, agreed: Offer, device: torch.device | None, watchdog: Watchdog) -> None:
        """Map the reply memory.

        Args:
            device: where replies are wanted. None: the current CUDA device where the launcher gave training GPUs, else the CPU.

        Raises:
            AttachError: the memory is not what the teacher announced, or this process has opened it for another device.
        """
        self.outputs = agreed.outputs
        self.device = choose(session, device)
        if session.plane is None:
            session.plane = select.of_rank(session, agreed, self.device)
            session.plane_device = self.device
        elif session.plane_device != self.device:
            raise AttachError(
                f"this process reads its replies on {session.plane_device}, and connects again for {self.device}: a lane has one "
                "device in the life of a process. Give connect(device=...) the same each time."
            )
        self.plane: RankPlane = session.plane
        self._shutdown_s = session.settings.timeouts.shutdown_s
        self._watchdog = watchdog
        self._lent: dict[int, Lent] = {}  # until they are taken back
        self._ended: deque[tuple[int, Lent]] = deque(maxlen=_EXPLAINED)  # with the version of their tensors at the end

    def read(self, number: int, extent: Extent, lent: Lent) -> dict[str, torch.Tensor]:
        """The tensors of a published reply, or chunk, of `extent`, on this rank's device. Raises TornReply, TeacherDied."""
        try:
            tensors = self.plane.read(number, extent)
        except RuntimeError as error:
            self._raise(error, number)
        if self.plane.keeps:
            self._lent[number] = lent
        return tensors

    def take_back(self, number: int) -> None:
        """The reply, or chunk, is not to be read any more. Raises TornReply, TeacherDied."""
        if self._watchdog.broken_at or (self.plane.keeps and number not in self._lent):
            return
        lent = self._lent.pop(number, None)
        try:
            version = self.plane.release(number)
        except RuntimeError as error:
            self._raise(error, number)
        if version is not None and lent is not None:
            self._ended.append((version, lent))

    def close(self) -> None:
        """Take everything back. A GPU that still reads a reply gets timeouts.shutdown_s for it, because the teacher's memory may go
        once all ranks have closed. Raises TornReply."""
        deadline = time.monotonic() + self._shutdown_s
        while self.plane.waits_for() and not self._watchdog.broken_at and time.monotonic() < deadline:
            time.sleep(_GPU_LOOK_S)
        for number in list(self._lent):
            self.take_back(number)
        self.plane.check()

    def explain(self, error: BaseException) -> None:
        """Add a note to autograd's error about a saved tensor that was lent and whose lease has ended."""
        found = _CHANGED.search(str(error)) if isinstance(error, RuntimeError) else None
        if found is None:
            return
        lent = next((lent for version, lent in reversed(self._ended) if version == int(found[1])), None)
        if lent is not None:
            error.add_note(
                f"This backward needs the reply to step {lent.step}, sequence {lent.sequence}, whose lease or chunk has ended: "
                "the teacher writes its memory again. Finish the backward inside the block of `with pending.wait() as reply:` or "
                "inside the loop over pending.chunks(), or use pending.copy()."
            )

    def _raise(self, error: RuntimeError, number: int) -> NoReturn:
        died = self._watchdog.blame(error, number)
        if died is None:
            raise error
        raise died from error
