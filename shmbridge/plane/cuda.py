"""The CUDA plane: replies in the teacher's GPU memory, which ranks read or copy. Interprocess events alone order the two sides.

    teacher   the lane's stream waits for free[slot], writes, stamps, ready[slot].record   then publishes the reply
    rank      a stream waits for ready[slot], copies, free[slot].record                    then publishes the release

No host waits for a GPU. Publishing says that an event has been recorded, not that the GPU has reached it. An event is recorded
before its cursor is published, and waited for only after the cursor was read.

The stamp: behind each payload the teacher's stream writes the number of the reply. If a teacher is killed while it writes, its
events may complete all the same. So a rank's stream reads the stamp before the payload, and writes a NaN into every position of
a reply whose stamp is wrong. When the host learns of it, the rank raises TornReply.

Each lane has a stream of its own in the teacher. The event of a rank that was killed may never complete, and then stops that
lane only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from shmbridge.errors import AttachError, TornReply
from shmbridge.output_spec import Extent
from shmbridge.plane import cuda_ipc, cuda_slab
from shmbridge.plane.base import LaneSpec, RankPlane, TeacherPlane
from shmbridge.plane.cuda_ipc import Event, Stream
from shmbridge.plane.cuda_slab import UNOPENED, Exchange, Export, Imported, Opened, Slab, Slabs, stamp
from shmbridge.plane.tensors import Slots
from shmbridge.shm.process import Identity

ON_THEIR_WAY = 256  # reads; a host that runs further ahead of its GPU waits for the oldest
_PENDING, _TORN = 2, 1  # bytes of a word; a stream writes False or True


class TeacherCudaPlane(TeacherPlane):
    """Teacher: the replies of one lane."""

    def __init__(self, spec: LaneSpec, slabs: Slabs) -> None:
        """Export the lane's slab.

        torch never frees memory that was exported to a process which was killed. So `slabs` keeps this process's slabs by lane, and
        a lane that comes again (training that starts again, a replica that takes over again) has the slab that it had, unless an
        earlier stream may still write to it.

        Raises:
            AttachError: the lane's reply segment is not what the offer says.
            PlanError: the GPU has no room for the slab.
        """
        slots, stride, generation = spec.shape.reply_slots, spec.stride, spec.token.generation
        slab = slabs.get(spec.lane.index)
        if slab is None or (slab.slots, slab.stride) != (slots, stride) or not slab.stream.query():
            slab = slabs[spec.lane.index] = Slab(spec.device, slots, stride, generation)
        slab.generation = generation
        self._slab, self._stream = slab, slab.stream
        self._ring = spec.lane.ring
        self._first = self._ring.filled if spec.shape.chunks else self._ring.replied
        self._exchange = Exchange(spec)
        self._export = self._exchange.write_export(slab.export(self._first))
        self._slots = spec.slots(slab.memory)
        self._free: list[Event] = []
        self._begun = -1  # the newest number that the stream may write
        self._followed = -1  # replies up to here, the last reads of which the stream waits for

    def write(
        self, number: int, extent: Extent, outputs: Mapping[str, torch.Tensor], position: int = 0, row: int = 0
    ) -> None:
        device, stream = self._slab.device, self._stream
        here = {name: tensor.to(device, non_blocking=True) for name, tensor in outputs.items()}
        stream.wait_stream(cuda_ipc.current_stream(device))  # which computes the outputs
        self._begin(number)
        with cuda_ipc.on(stream):
            self._slots.write(number, extent, here, position, row)
        cuda_ipc.keep_until(here.values(), stream)

    def _begin(self, number: int) -> None:
        """Once for each number: have the stream wait for the rank's last read of the slot. The rank has published that release: its
        request, or the room for a chunk, came after it."""
        if number <= self._begun:
            return
        self._begun = number
        if not self._free:  # with the first reply, so that events which do not open are seen before training
            self._free = self._open_free()
        if self._free and number >= self._first + self._slab.slots:
            self._stream.wait_event(self._free[number % self._slab.slots])

    def _open_free(self) -> list[Event]:
        """The rank's events; none until it has opened this slab. Raises AttachError."""
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
        """Stamp the reply and record its event, after which it may be published at once."""
        self._begin(number)
        slab, slot = self._slab, number % self._slab.slots
        with cuda_ipc.on(self._stream):
            slab.stamps[slot].fill_(stamp(slab.generation, number))
        slab.ready[slot].record(self._stream)
        return None

    def settled(self) -> bool:
        """Whether the rank has released every reply, and neither GPU uses one any more. Never blocks. Raises AttachError.

        The lane's stream waits for the rank's events, and the stream is queried: whether an event of another process answers a
        query is not known.
        """
        replied = self._ring.replied
        if self._ring.released < replied:
            return False
        if self._followed != replied:
            self._followed = replied
            for event in self._free or self._open_free():
                self._stream.wait_event(event)
        return self._stream.query()


class Read(NamedTuple):
    """One read that was launched, and the indexes of its words."""

    number: int
    stamp: int  # expected
    teacher: Identity
    ended: int
    begun: int


class Reads:
    """The replies that a rank's GPU still reads, oldest first, as its host sees them without a call of CUDA.

    Before a read is launched the host writes a sentinel into the read's word in pinned host memory. Behind the payload the stream
    overwrites it with whether the stamp was wrong. The watchdog's thread looks at these words too: an event query there would
    make a context on GPU 0, and could itself wait for the stream that is stuck.
    """

    def __init__(self, device: torch.device) -> None:
        """The words: the first half for the ends of reads, the second for their beginnings."""
        words = cuda_ipc.pinned(2 * ON_THEIR_WAY, device)
        self.words = words.unbind()
        self._bytes = memoryview(words.view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._pending: deque[Read] = deque()
        self._count = 0

    def prepare(self, number: int, stamp: int, teacher: Identity, tells_beginning: bool) -> Read:
        """Give a read its words, before it is launched. Waits where ON_THEIR_WAY reads are pending. A stream that launches nothing
        but reads need not tell their beginnings: it stands at the oldest. Raises TornReply."""
        while len(self._pending) == ON_THEIR_WAY:
            cuda_ipc.pause()
            self.check()
        ended = self._count % ON_THEIR_WAY
        begun = ended + ON_THEIR_WAY
        self._bytes[ended] = _PENDING
        self._bytes[begun] = _PENDING if tells_beginning else False
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
        """The oldest read that the GPU has not finished. Any thread may call it."""
        return next((read for read in tuple(self._pending) if self._bytes[read.ended] == _PENDING), None)

    def stands_at(self) -> Read | None:
        """The oldest read, if the GPU has reached it. Any thread may call it."""
        read = self.oldest()
        return read if read and self._bytes[read.begun] != _PENDING else None


class _Source(NamedTuple):
    """The slab of one teacher, as the rank reads replies from it. The lists and the dict are by slot."""

    slab: Opened
    slots: Slots
    free: list[Event]  # this rank's own, exported: recorded behind the last read of a slot
    firsts: dict[int, tuple[dict[str, torch.Tensor], list[torch.Tensor]]]  # its latest views, and their _firsts


class RankCudaPlane(RankPlane):
    """Rank: the replies of its lane.

    With `in_place` the tensors are views of the teacher's memory, and the slot belongs to the rank until `release`. Else they are
    copies, and the slot is free when `read` returns.
    """

    def __init__(self, spec: LaneSpec, *, in_place: bool) -> None:
        """Open the lane's slab. Raises AttachError."""
        self.keeps = self.lends = in_place
        self._spec, self._device = spec, spec.device
        self._exchange = Exchange(spec)
        self._opened: dict[int, _Source] = {}  # by the number of the export
        self._retired: list[_Source] = []
        self._held: dict[int, _Source] = {}  # by number: where a lent reply lies
        with torch.inference_mode(False):  # the first reply may be an evaluation's, and training writes here as well
            self._reads = Reads(self._device)
            self._here = cuda_ipc.zero(self._device)
        self._opening: tuple[Identity, int] | None = None  # the host waits for an event of this teacher
        self._side = cuda_ipc.side_stream(self._device)
        self._waits: deque[tuple[Event, Event]] = deque()
        self._open(self._exchange.exports, self._exchange.read_export(self._exchange.exports))

    def read(self, number: int, extent: Extent) -> dict[str, torch.Tensor]:
        self.check()
        source = self._of(number)
        if self.keeps:
            self._held[number] = source
        expected = stamp(source.slab.generation, number)
        read = self._reads.prepare(number, expected, source.slab.teacher, tells_beginning=self.keeps)
        tensors = (self._lend if self.keeps else self._copy)(source, read, number % source.slab.slots, extent)
        self._reads.launched(read)
        return tensors

    def _lend(self, source: _Source, read: Read, slot: int, extent: Extent) -> dict[str, torch.Tensor]:
        """Views of the slot, for the current stream."""
        compute = cuda_ipc.current_stream(self._device)
        cuda_ipc.tell_host(self._reads.words[read.begun], self._here)
        self._wait(compute, source.slab.ready[slot])
        torn = source.slab.stamps[slot].ne(read.stamp)
        views = source.slots.views(read.number, extent)
        known = source.firsts.get(slot)
        if known is None or known[0] is not views:
            known = source.firsts[slot] = views, self._firsts(views)
        self._end(read, torn, known[1])
        return source.slots.lend(read.number, extent)

    def _copy(self, source: _Source, read: Read, slot: int, extent: Extent) -> dict[str, torch.Tensor]:
        """Copies that the side stream makes, and that the current stream waits for."""
        views, free = source.slots.views(read.number, extent), source.free[slot]
        with cuda_ipc.on(self._side) as compute:
            self._side.wait_event(source.slab.ready[slot])
            torn = source.slab.stamps[slot].ne(read.stamp)
            copies = {name: view.clone() for name, view in views.items()}
            self._end(read, torn, self._firsts(copies))
            free.record(self._side)
        self._wait(compute, free)
        cuda_ipc.keep_until(copies.values(), compute)
        return copies

    def _end(self, read: Read, torn: torch.Tensor, firsts: list[torch.Tensor]) -> None:
        """On the current stream: a NaN in each of `firsts` where `torn`, of which the host learns."""
        for first in firsts:
            first.masked_fill_(torn, torch.nan)
        cuda_ipc.tell_host(self._reads.words[read.ended], torn)

    def _firsts(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Views of the first number of every position, for each output of floats."""
        found = []
        for spec in self._spec.agreed.outputs:
            tensor = tensors[spec.name]
            if tensor.is_floating_point() and tensor.numel():
                per_number = len(spec.shape) > spec.per_token  # an axis of numbers behind that of rows or positions
                found.append(tensor[..., 0] if per_number else tensor)
        return found

    def _wait(self, stream: Stream, until: Event) -> None:
        """Have the stream wait. Where `timed`, it takes the time that it waits."""
        if not self.timed:
            stream.wait_event(until)
            return
        began, ended = cuda_ipc.timed_event(), cuda_ipc.timed_event()
        began.record(stream)
        stream.wait_event(until)
        ended.record(stream)
        self._waits.append((began, ended))

    def stalled_s(self) -> float:
        stalled = 0.0
        while self._waits and self._waits[0][1].query():
            began, ended = self._waits.popleft()
            stalled += began.elapsed_time(ended) / 1000
        return stalled

    def _open(self, nth: int, export: Export) -> _Source:
        """Open the lane's `nth` export. The memory of the export before is kept, because replies may still lie there. Memory of
        earlier ones is closed when this rank's GPU reads nothing: closing waits for the device, which may wait for an event of a
        teacher that is gone."""
        while len(self._opened) > 1:
            self._retired.append(self._opened.pop(min(self._opened)))
        if self._reads.oldest() is None:
            self._retired.clear()
        self._opening = export.teacher, export.first
        try:
            slab = cuda_slab.Opened(export, self._device)
        finally:
            self._opening = None
        found = slab.slots, slab.stride, slab.generation
        expected = self._spec.shape.reply_slots, self._spec.stride, self._spec.token.generation
        if found != expected:
            raise AttachError(
                f"the teacher's slab has slots, stride, generation {found}, expected {expected}: garbled."
            )
        free = [cuda_ipc.shared_event(self._device) for _ in range(slab.slots)]
        source = self._opened[nth] = _Source(slab, self._spec.slots(slab.memory), free, {})
        if nth == max(self._opened):  # no teacher waits for the answer to an older one
            self._exchange.write_imported(nth, Imported(tuple(map(cuda_ipc.export_event, free))))
        return source

    def _of(self, number: int) -> _Source:
        """Where a published reply lies: in the slab of the newest teacher whose first reply is not after it. The slab of a teacher
        that answered nothing is not opened, because handles of a process that is gone do not open. Raises AttachError."""
        for nth in range(self._exchange.exports, min(self._opened), -1):
            source = self._opened.get(nth)
            if source is None:
                export = self._exchange.read_export(nth)
                if export.first > number:
                    continue
                source = self._open(nth, export)
            if source.slab.first <= number:
                return source
        return self._opened[min(self._opened)]

    def release(self, number: int) -> int | None:
        version = None
        if self.keeps:  # what the current stream holds now is the last that reads the reply in place
            source = self._held.pop(number)
            source.free[number % source.slab.slots].record(cuda_ipc.current_stream(self._device))
            version = source.slots.take_back(number)
        self.check()
        return version

    def check(self) -> None:
        self._reads.check()

    def teachers(self) -> tuple[Identity, ...]:
        return tuple(source.slab.teacher for source in self._opened.values())

    def waits_for(self) -> Identity | None:
        read = self._reads.oldest()
        return read and read.teacher

    def stands_at(self) -> tuple[Identity, int] | None:
        read, opening = self._reads.stands_at(), self._opening
        return (read.teacher, read.number) if read else opening
