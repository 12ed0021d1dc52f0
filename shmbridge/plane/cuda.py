"""The CUDA plane: replies in the teacher's GPU memory, read or copied by the ranks, ordered by interprocess events alone.

    teacher   the lane's stream waits for free[slot], writes, stamps, ready[slot].record   then publishes the reply
    rank      a stream waits for ready[slot], copies, free[slot].record                    then publishes the release

Neither side's host ever waits for a GPU: what is published is that an event has been recorded, not that it has come. An
event is recorded before its cursor is published, and waited for only after the cursor was read.

The stamp. After a payload the teacher's stream writes the number of the reply behind it. Where a teacher is killed in the
middle, its events may come all the same; so a rank's stream takes the stamp before the payload, and puts a NaN into every
position of a reply that did not have it. Later, when the stamp has reached the host, the rank raises TornReply.

Each lane has a stream of its own in the teacher, so that the event of a rank that was killed, which may never come, holds up
that lane and no other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from shmbridge.errors import AttachError, TornReply
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import cuda_ipc, cuda_slab
from shmbridge.plane.cuda_ipc import Event, Stream
from shmbridge.plane.cuda_slab import UNOPENED, Exchange, Export, Imported, Opened, Slab, stamp
from shmbridge.plane.tensors import Slots
from shmbridge.shm.process import Identity
from shmbridge.shm.session import Lane, Shape, Token

ON_THEIR_WAY = 256  # reads; a host that runs further ahead of its GPU waits for the oldest
_PENDING, _TORN = 2, 1  # bytes of a word; a stream writes False or True


class TeacherCudaPlane:
    """Teacher: the replies of one lane."""

    def __init__(
        self, token: Token, shape: Shape, lane: Lane, agreed: Offer, device: torch.device, slabs: dict[int, Slab]
    ) -> None:
        """Export the lane's slab on `device`. `slabs` are this process's, by lane: torch does not take memory back that was
        exported to a process which was killed, so a lane that comes again (training that starts again, a replica that takes
        over again) finds the slab that it had. Raises AttachError, PlanError."""
        self._slab = slab = _slab_of(slabs, lane.index, device, shape, agreed, token.generation)
        self._ring = lane.ring
        self._first = lane.ring.filled if shape.chunks else lane.ring.replied
        self._exchange = Exchange(token, shape, lane.index)
        self._export = self._exchange.write_export(slab.export(self._first))
        self._slots = _slots(slab, agreed)
        self._stream = slab.stream
        self._free: list[Event] = []
        self._begun = -1  # the newest number that the stream may write
        self._followed = -1  # replies up to here, the last reads of which the stream waits for

    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None:
        """Copy `outputs` into the reply on the lane's stream, after all that was launched before: see Slots.write."""
        device, stream = self._slab.device, self._stream
        here = {name: tensor.to(device, non_blocking=True) for name, tensor in outputs.items()}
        stream.wait_stream(cuda_ipc.current_stream(device))
        self._begin(number)
        with cuda_ipc.on(stream):
            self._slots.write(number, extent, here, position, row)
        cuda_ipc.keep_until(here.values(), stream)

    def _begin(self, number: int) -> None:
        """Once for each number: wait, on the stream, for the rank's last read of the slot. That its release was published is
        known: the rank's request, or the room for a chunk, came after."""
        if number <= self._begun:
            return
        self._begun = number
        if not self._free:  # with the first reply, so that what does not open is seen before training
            self._free = self._open_free()
        if self._free and number >= self._first + self._slab.slots:
            self._stream.wait_event(self._free[number % self._slab.slots])

    def _open_free(self) -> list[Event]:
        """The rank's events; none as long as it has opened nothing of this slab. Raises AttachError."""
        slab = self._slab
        if self._exchange.imported < self._export:
            return []
        imported = self._exchange.read_imported()
        if len(imported.free) != slab.slots:
            raise AttachError(f"the rank tells {len(imported.free)} events for {slab.slots} slots: garbled.")
        try:
            return [cuda_ipc.open_event(handle, slab.device) for handle in imported.free]
        except UNOPENED as error:
            raise AttachError(
                f"the rank's events cannot be opened on {slab.device}: {error}. Set plane=host."
            ) from None

    def seal(self, number: int) -> Callable[[], None] | None:
        """Stamp the reply and record its event: it may be published at once. Nothing of it is written any more."""
        self._begin(number)
        slab, slot = self._slab, number % self._slab.slots
        with cuda_ipc.on(self._stream):
            slab.stamps[slot].fill_(stamp(slab.generation, number))
        slab.ready[slot].record(self._stream)
        return None

    def settled(self) -> bool:
        """The rank has what was published, and neither side's GPU is at it any more. Never blocks. Raises AttachError.

        The rank's events are waited for on the lane's stream, and that is asked: whether an event of another process answers
        a query is not known.
        """
        replied = self._ring.replied
        if self._ring.released < replied:
            return False
        if self._followed != replied:
            self._followed = replied
            for event in self._free or self._open_free():
                self._stream.wait_event(event)
        return self._stream.query()


def _slab_of(
    slabs: dict[int, Slab], lane: int, device: torch.device, shape: Shape, agreed: Offer, generation: int
) -> Slab:
    """The slab that the lane had, unless an earlier stream may still write to it; else a new one. Raises PlanError."""
    slots, stride = shape.reply_slots, shape.slot_bytes(agreed.outputs)
    slab = slabs.get(lane)
    if slab is None or (slab.slots, slab.stride) != (slots, stride) or not slab.stream.query():
        slab = slabs[lane] = Slab(device, slots, stride, generation)
    slab.generation = generation
    return slab


class Read(NamedTuple):
    """One read that was launched, and the indexes of its words."""

    number: int
    stamp: int  # expected
    teacher: Identity
    ended: int
    begun: int | None  # None: its stream launches nothing but reads, so it stands at the oldest


class Reads:
    """The reads of one rank, oldest first."""

    def __init__(self, words: torch.Tensor, pause: Callable[[], None]) -> None:
        """`words`: (2 * ON_THEIR_WAY,) bool in pinned host memory; the first half are for the ends of reads, the second for
        their beginnings. `pause` sleeps for a moment."""
        self.words = words.unbind()
        self._bytes = memoryview(words.view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._pause = pause
        self._pending: deque[Read] = deque()
        self._count = 0

    def prepare(self, number: int, stamp: int, teacher: Identity, with_beginning: bool) -> Read:
        """Give a read its words, before it is launched. Waits where ON_THEIR_WAY reads are pending. Raises TornReply."""
        while len(self._pending) == ON_THEIR_WAY:
            self.check()
            if len(self._pending) == ON_THEIR_WAY:
                self._pause()
        ended = self._count % ON_THEIR_WAY
        begun = ended + ON_THEIR_WAY if with_beginning else None
        self._bytes[ended] = _PENDING
        if begun is not None:
            self._bytes[begun] = _PENDING
        return Read(number, stamp, teacher, ended, begun)

    def launched(self, read: Read) -> None:
        """The stream will write the words of `read`."""
        self._count += 1
        self._pending.append(read)

    def check(self) -> None:
        """Look at the reads that are over, without waiting. Raises TornReply."""
        while self._pending and (found := self._bytes[self._pending[0].ended]) != _PENDING:
            read = self._pending.popleft()
            if found == _TORN:
                raise TornReply(
                    f"reply {read.number} does not carry its stamp, {read.stamp:#x}: the teacher was killed while it wrote, or "
                    "its memory was overwritten. Every position of the reply holds a NaN: go back to the last checkpoint."
                )

    def oldest(self) -> Read | None:
        """The oldest read that the GPU has not finished. Any thread may ask."""
        return next((read for read in tuple(self._pending) if self._bytes[read.ended] == _PENDING), None)

    def stands_at(self) -> Read | None:
        """The oldest read, where the GPU has come to it. Any thread may ask."""
        read = self.oldest()
        return None if read is None or (read.begun is not None and self._bytes[read.begun] == _PENDING) else read

    def __len__(self) -> int:
        return len(self._pending)


class _Import(NamedTuple):
    """What the rank has opened of one teacher."""

    nth: int  # of the lane's exports
    first: int  # number of the first reply, or chunk, that lies in it
    teacher: Identity
    slab: Opened
    slots: Slots
    events: list[Event]  # this rank's own, exported: a slot's last read
    firsts: dict[
        int, tuple[dict[str, torch.Tensor], list[torch.Tensor]]
    ]  # of the views that a slot had last: see _firsts

    def ready(self, number: int) -> Event:
        return self.slab.ready[number % self.slab.slots]

    def free(self, number: int) -> Event:
        return self.events[number % self.slab.slots]

    def torn(self, read: Read) -> torch.Tensor:
        """Whether the slot's stamp is another than that of `read`: () bool, computed on the current stream."""
        return self.slab.stamps[read.number % self.slab.slots].ne(read.stamp)


class RankCudaPlane:
    """Rank: the replies of its lane.

    With `in_place` the tensors are views of the teacher's memory, and the slot is the rank's until `release`; else they are
    copies, and the slot is free again once `read` returns.
    """

    def __init__(
        self, token: Token, shape: Shape, lane: Lane, agreed: Offer, device: torch.device, *, in_place: bool
    ) -> None:
        """Open the lane's slab on `device`. Raises AttachError."""
        self.keeps = self.lends = in_place
        self.timed = False
        self._device = device
        self._expected = shape.reply_slots, shape.slot_bytes(agreed.outputs), token.generation
        self._agreed = agreed
        self._exchange = Exchange(token, shape, lane.index)
        self._opened: dict[int, _Import] = {}  # by the number of the export
        self._retired: list[_Import] = []
        self._held: dict[int, _Import] = {}  # where the replies lie that are lent
        with torch.inference_mode(False):  # the first reply may be an evaluation's, and training writes here as well
            self._reads = Reads(cuda_ipc.pinned(2 * ON_THEIR_WAY, device), cuda_ipc.pause)
            self._here = cuda_ipc.zero(device)
        self._opening: tuple[Identity, int] | None = None  # the host waits for an event of this teacher's
        self._side = cuda_ipc.side_stream(device)
        self._waits: deque[tuple[Event, Event]] = deque()
        self._open(self._exchange.exports, self._exchange.read_export(self._exchange.exports))

    def read(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        """The tensors of a published reply, on this rank's device and for its current stream.

        Raises:
            TornReply: an earlier reply turned out to be torn.
        """
        self.check()
        source = self._of(number)
        if self.keeps:
            self._held[number] = source
        expected = stamp(source.slab.generation, number)
        read = self._reads.prepare(number, expected, source.teacher, with_beginning=self.keeps)
        tensors = self._lend(source, read, extent) if self.keeps else self._copy(source, read, extent)
        self._reads.launched(read)
        return tensors

    def _lend(self, source: _Import, read: Read, extent: Extent) -> dict[str, torch.Tensor]:
        """Views of the slot, for the current stream."""
        compute = cuda_ipc.current_stream(self._device)
        cuda_ipc.tell_host(self._reads.words[read.begun], self._here)  # type: ignore[index]
        self._wait(compute, source.ready(read.number))
        torn = source.torn(read)
        views, slot = source.slots.views(read.number, extent), read.number % source.slab.slots
        known = source.firsts.get(slot)
        if known is None or known[0] is not views:
            known = source.firsts[slot] = views, self._firsts(views)
        _poison(torn, known[1])
        cuda_ipc.tell_host(self._reads.words[read.ended], torn)
        return source.slots.lend(read.number, extent)

    def _copy(self, source: _Import, read: Read, extent: Extent) -> dict[str, torch.Tensor]:
        """Copies that the side stream makes, and that the current stream waits for."""
        views, free = source.slots.views(read.number, extent), source.free(read.number)
        with cuda_ipc.on(self._side) as compute:
            self._side.wait_event(source.ready(read.number))
            torn = source.torn(read)
            copies = {name: view.clone() for name, view in views.items()}
            _poison(torn, self._firsts(copies))
            cuda_ipc.tell_host(self._reads.words[read.ended], torn)
            free.record(self._side)
        self._wait(compute, free)
        cuda_ipc.keep_until(copies.values(), compute)
        return copies

    def _firsts(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of every output of floats, the first number of every position."""
        found = []
        for spec in self._agreed.outputs:
            tensor = tensors[spec.name]
            if tensor.is_floating_point() and tensor.numel():
                per_number = len(spec.shape) > spec.per_token  # an axis of numbers behind that of rows or positions
                found.append(tensor[..., 0] if per_number else tensor)
        return found

    def _wait(self, stream: Stream, until: Event) -> None:
        """On the stream. Where `timed`, the stream takes the time that it stands still."""
        if not self.timed:
            stream.wait_event(until)
            return
        began, ended = cuda_ipc.timed_event(), cuda_ipc.timed_event()
        began.record(stream)
        stream.wait_event(until)
        ended.record(stream)
        self._waits.append((began, ended))

    def stalled_s(self) -> float:
        """Seconds that this rank's GPU stood still for replies, as far as they are over and were not told before."""
        stalled = 0.0
        while self._waits and self._waits[0][1].query():
            began, ended = self._waits.popleft()
            stalled += began.elapsed_time(ended) / 1000
        return stalled

    def _open(self, nth: int, export: Export) -> _Import:
        """Open the lane's `nth` export. The memory of the one before is kept, since replies may lie there still;
        that of earlier ones is closed, once this rank's GPU has read its replies."""
        while len(self._opened) > 1:
            self._retired.append(self._opened.pop(min(self._opened)))
        if (
            self._reads.oldest() is None
        ):  # closing waits for the device, which may wait for an event of a teacher that is gone
            self._retired.clear()
        teacher = Identity(export.pid, export.start)
        self._opening = teacher, export.first
        try:
            slab = cuda_slab.Opened(export, self._device)
        finally:
            self._opening = None
        found = slab.slots, slab.stride, slab.generation
        if found != self._expected:
            raise AttachError(
                f"the teacher's slab has slots, stride, generation {found}, expected {self._expected}: garbled."
            )
        events = [cuda_ipc.shared_event(self._device) for _ in range(slab.slots)]
        opened = _Import(nth, export.first, teacher, slab, _slots(slab, self._agreed), events, {})
        self._opened[nth] = opened
        if nth == max(self._opened):  # no teacher waits for the answer to an older one
            self._exchange.write_imported(nth, Imported(tuple(map(cuda_ipc.export_event, events))))
        return opened

    def _of(self, number: int) -> _Import:
        """Where a published reply lies: in the memory of the newest teacher whose first reply it is, or came before it. A teacher
        that answered nothing is passed over, since handles of a process that is gone do not open. Raises AttachError."""
        for nth in range(self._exchange.exports, min(self._opened), -1):
            opened = self._opened.get(nth)
            if opened is None:
                export = self._exchange.read_export(nth)
                if export.first > number:
                    continue
                opened = self._open(nth, export)
            if opened.first <= number:
                return opened
        return self._opened[min(self._opened)]

    def release(self, number: int) -> int | None:
        """Before the slot is given back: what the current stream holds now is the last that reads it in place."""
        version = None
        if self.keeps:
            source = self._held.pop(number)
            source.free(number).record(cuda_ipc.current_stream(self._device))
            version = source.slots.take_back(number)
        self.check()
        return version

    def check(self) -> None:
        """Look at the replies that the GPU has read, without waiting. Raises TornReply."""
        self._reads.check()

    def teachers(self) -> tuple[Identity, ...]:
        """See planes.RankPlane."""
        return tuple(opened.teacher for opened in self._opened.values())

    def waits_for(self) -> Identity | None:
        """See planes.RankPlane."""
        read = self._reads.oldest()
        return read and read.teacher

    def stands_at(self) -> tuple[Identity, int] | None:
        """See planes.RankPlane."""
        read, opening = self._reads.stands_at(), self._opening
        return (read.teacher, read.number) if read else opening


def _poison(torn: torch.Tensor, firsts: list[torch.Tensor]) -> None:
    """On the current stream: a NaN in each of `firsts` where `torn`."""
    for first in firsts:
        first.masked_fill_(torn, torch.nan)


def _slots(slab: Slab | Opened, agreed: Offer) -> Slots:
    return Slots(agreed.outputs, slab.slots, slab.stride, slab.memory)
