"""What the teacher answered: Reply as the loop reads it, Replies as they are read from the ring and the plane."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import NoReturn

import torch

from shmbridge.errors import AttachError, Closed, TeacherError
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import factory
from shmbridge.plane.base import RankPlane
from shmbridge.plane.tensors import DTYPES
from shmbridge.rank.device import Watchdog, choose
from shmbridge.rank.request import Request
from shmbridge.rank.stats import Meter
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.ring import Composition, ReplyHead

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
        composition: Composition | None = None,
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
            if self.missing:
                raise KeyError(
                    f"the reply has no {name!r}: it is missing, because the bridge is off or the teacher is lost; look at "
                    "reply.missing first and use the script's own loss then, as scripts/example.py does"
                )
            remedy = "; set payload.hidden={}" if name == "hidden" else ""
            if name == "logits" and "hidden" in self:
                remedy = "; with payload.hidden={} read LazyLogits(reply.hidden, bridge.head)"
            raise KeyError(f"the reply has no {name!r}; it has {', '.join(self._tensors)}{remedy}")
        return self._tensors[name]

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


class Replies:
    """Reads the replies of one bridge. A `number` is a sequence, or the number of a chunk where replies are streamed."""

    def __init__(
        self, session: RankSession, offer: Offer, device: torch.device | None, watchdog: Watchdog, meter: Meter
    ) -> None:
        """Map the reply memory.

        Args:
            device: where replies are wanted. None: the current CUDA device where the launcher gave training GPUs, else the CPU.

        Raises:
            AttachError: the memory is not what the teacher announced, or this process has opened it for another device.
        """
        self.outputs = offer.outputs
        self.device = choose(session, device)
        if session.plane is None:
            session.plane = factory.of_rank(session, offer, self.device)
            session.plane_device = self.device
        elif session.plane_device != self.device:
            raise AttachError(
                f"this process reads its replies on {session.plane_device}, and connects again for {self.device}: a lane has one "
                "device in the life of a process. Give connect(device=...) the same each time."
            )
        self.plane: RankPlane = session.plane
        self.plane.timed |= meter.every > 0
        self.lent: dict[int, Request] = {}  # by number, until they are taken back
        self.last_head: ReplyHead
        self._session = session
        self._watchdog = watchdog
        self._meter = meter
        self._ended: deque[tuple[int, Request]] = deque(maxlen=_EXPLAINED)  # with the version of its tensors at the end

    def head(self, request: Request) -> ReplyHead:
        """The head of a published reply. Raises TeacherError."""
        head = self._session.ring.read_reply(request.sequence)
        if head.error is not None:
            raise TeacherError(
                f"the teacher could not answer rank {self._session.lane.index}, step {request.step}, sequence "
                f"{request.sequence}.",
                head.error,
            )
        self._meter.waited(self.plane.stalled_s())
        self._meter.replied(request.step, head.composition)
        self.last_head = head
        return head

    def read(self, request: Request) -> Reply:
        """A published reply, on this rank's device. Raises TeacherError, TornReply, TeacherDied."""
        head = self.head(request)
        return self._read(request, request.sequence, request.extent, head.composition)

    def read_chunk(self, request: Request, start: int) -> tuple[int, Reply, int]:
        """The next chunk, which begins at position `start`: its number, its tensors, and the position behind its last.

        Raises:
            AttachError: it is garbled.
            TeacherError: the teacher has raised, and there is none.
            TornReply, TeacherDied
        """
        chunk = self._session.ring.next_chunk(request.sequence)
        if chunk is None:  # answered, and no chunk was published before that
            self.head(request)
            raise AttachError(f"the reply to sequence {request.sequence} ends before its last chunk: refused.")
        most = min(self._session.control.shape.chunk_positions, request.extent.positions - start)
        if chunk.start != start or not 0 < chunk.positions <= most:
            raise AttachError(
                f"chunk {chunk.number} of sequence {request.sequence} tells {chunk.positions} positions from {chunk.start} on, "
                f"expected 1 to {most} from {start} on: refused."
            )
        reply = self._read(request, chunk.number, Extent(0, 0, chunk.positions))
        if not self.plane.keeps:
            self._consume(chunk.number)
        return chunk.number, reply, start + chunk.positions

    def release_chunk(self, number: int) -> None:
        """The chunk is not to be read any more. Raises TornReply, TeacherDied."""
        self.take_back(number)
        if self.plane.keeps:
            self._consume(number)

    def _consume(self, number: int) -> None:
        self._session.ring.consume(number)
        self._session.ring_teacher()

    def _read(self, request: Request, number: int, extent: Extent, composition: Composition | None = None) -> Reply:
        try:
            tensors = self.plane.read(number, extent)
        except RuntimeError as error:
            self._raise(error, number)
        if self.plane.keeps:
            self.lent[number] = request
        return Reply(_wanted(tensors, request), request.sequence, request.step, composition, lent=self.plane.lends)

    def empty(self, request: Request) -> dict[str, torch.Tensor]:
        """Tensors of a whole reply that the rank owns, for its chunks to be copied to."""
        whole = {
            spec.name: torch.empty(spec.dims(request.extent), dtype=DTYPES[spec.dtype], device=self.device)
            for spec in self.outputs
        }
        return _wanted(whole, request)

    def as_chunk(self, request: Request, reply: Reply) -> Reply:
        """A whole reply in the shape of a chunk: its positions in one axis."""
        names = [spec.name for spec in self.outputs if spec.per_token and spec.name in reply]
        tensors = {name: flat(reply[name], request.extent) for name in names}
        return Reply(tensors, reply.sequence, reply.step, reply.composition, lent=self.plane.lends)

    def take_back(self, number: int) -> None:
        """The reply, or chunk, is not to be read any more. Raises TornReply, TeacherDied."""
        request = self.lent.pop(number, None)
        if self._watchdog.broken_at or (self.plane.keeps and request is None):
            return
        try:
            version = self.plane.release(number)
        except RuntimeError as error:
            self._raise(error, number)
        if version is not None and request is not None:
            self._ended.append((version, request))

    def close(self) -> None:
        """Take everything back. A GPU that still reads a reply gets timeouts.shutdown_s for it, because the teacher's memory may go
        once all ranks have closed. Raises TornReply."""
        deadline = time.monotonic() + self._session.settings.timeouts.shutdown_s
        while self.plane.waits_for() and not self._watchdog.broken_at and time.monotonic() < deadline:
            time.sleep(_GPU_LOOK_S)
        for number in list(self.lent):
            self.take_back(number)
        self.plane.check()

    def explain(self, error: BaseException) -> None:
        """Add a note to autograd's error about a saved tensor that was lent and whose lease has ended."""
        found = _CHANGED.search(str(error)) if isinstance(error, RuntimeError) else None
        request = next((each for version, each in reversed(self._ended) if found and version == int(found[1])), None)
        if request is not None:
            error.add_note(
                f"This backward needs the reply to step {request.step}, sequence {request.sequence}, whose lease or chunk has "
                "ended: the teacher writes its memory again. Finish the backward inside the block of `with pending.wait() as "
                "reply:` or inside the loop over pending.chunks(), or use pending.copy()."
            )

    def _raise(self, error: RuntimeError, number: int) -> NoReturn:
        died = self._watchdog.blame(error, number)
        if died is None:
            raise error
        raise died from error


def flat(tensor: torch.Tensor, extent: Extent) -> torch.Tensor:
    """The axes (batch, seq) of a tensor as one; where positions were chosen they are one already."""
    return tensor.flatten(0, 1) if extent.chosen is None else tensor


def _wanted(tensors: dict[str, torch.Tensor], request: Request) -> dict[str, torch.Tensor]:
    """`tensors` without what the payload has and `request` did not ask for."""
    if "candidates" not in request.arrays:
        tensors.pop("candidate_logprobs", None)
    return tensors
