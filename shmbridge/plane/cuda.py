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

from shmbridge.errors import AttachError, PlanError
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import cuda_ipc
from shmbridge.plane.cuda_exchange import Exchange, Export, Imported
from shmbridge.plane.cuda_ipc import Event, Stream
from shmbridge.plane.cuda_reads import ON_THEIR_WAY, Read, Reads
from shmbridge.plane.tensors import Slots
from shmbridge.shm import process
from shmbridge.shm.process import Identity
from shmbridge.shm.session import Lane, Shape, Token

_STAMP_BYTES = 8
_GENERATIONS = 2**20  # a stamp is generation * 2**43 + number + 1, an int64
_NUMBERS = 2**43
_SAMPLE_BYTES = 4096

# What torch raises for handles: CUDA's refusals, and its own of what is garbled.
_UNOPENED = (RuntimeError, TypeError, ValueError, OverflowError)


def slab_bytes(slots: int, stride: int) -> int:
    """Bytes of `slots` reply slots of `stride` bytes, their stamps, and the sample, which no reply writes over: a rank opens
    the slab of a later teacher when that has answered."""
    return slots * (stride + _STAMP_BYTES) + _SAMPLE_BYTES


class Slab:
    """Teacher: the reply slots of one lane in this GPU's memory, held for the life of the process."""

    def __init__(self, device: torch.device, slots: int, stride: int, generation: int) -> None:
        """Allocate, and leave a sample behind the slots for the rank to check. Raises PlanError."""
        self.device = device
        self.slots, self.stride, self.generation = slots, stride, generation
        try:
            self.memory = cuda_ipc.allocate(slab_bytes(slots, stride), device)
        except torch.OutOfMemoryError:
            raise PlanError(
                f"the reply slots of one rank take {slab_bytes(slots, stride) / 2**20:,.0f} MiB, which {device} of the teacher "
                "does not have. Lower ring.depth or ring.max_tokens, send less (payload.topk={}), or set plane=host."
            ) from None
        self.stream = cuda_ipc.side_stream(device)
        self.stamps = _stamps(self.memory, slots, stride)
        self.ready = [cuda_ipc.shared_event(device) for _ in range(slots)]
        sample = _sample(self.memory, slots, stride)
        sample.copy_(torch.arange(len(sample), device=device) % 251)
        self._checksum = int(sample.sum())
        self.ready[0].record(cuda_ipc.current_stream(device))

    def export(self, first: int = 0) -> Export:
        """For one importer, which finds replies from number `first` on in it."""
        pid, start = process.myself()
        return Export(
            torch=str(torch.__version__),
            pid=pid,
            start=start,
            pid_namespace=cuda_ipc.pid_namespace(),
            gpu=cuda_ipc.identify(self.device),
            slots=self.slots,
            stride=self.stride,
            generation=self.generation,
            first=first,
            memory=cuda_ipc.export_memory(self.memory),
            ready=tuple(map(cuda_ipc.export_event, self.ready)),
            checksum=self._checksum,
        )


class Opened:
    """Rank: a slab of the teacher's, opened on this rank's own device. To be kept for life."""

    def __init__(self, export: Export, device: torch.device) -> None:
        """Open, wait for the first event, and compare the sample.

        Raises:
            AttachError: what does not match, or what CUDA said; with the remedy.
        """
        _check(export)
        self.device = device
        self.slots, self.stride, self.generation = export.slots, export.stride, export.generation
        try:
            self.memory = cuda_ipc.open_memory(export.memory, device)
            self.ready = [cuda_ipc.open_event(handle, device) for handle in export.ready]
            stream = cuda_ipc.side_stream(device)  # the current one may wait for a teacher that is gone
            stream.wait_event(self.ready[0])
            with cuda_ipc.on(stream):
                found = int(_sample(self.memory, self.slots, self.stride).sum())
        except _UNOPENED as error:
            raise AttachError(
                f"GPU {export.gpu} cannot be read from {device}: {error}. Set plane=host, which goes through host memory."
            ) from None
        if found != export.checksum:
            raise AttachError(
                f"{device} reads {found} from GPU {export.gpu}, where {export.checksum} was written: access between the two is "
                "broken. Set plane=host, which goes through host memory."
            )
        self.stamps = _stamps(self.memory, self.slots, self.stride)


def _check(export: Export) -> None:
    """What both processes must have alike. Raises AttachError."""
    if export.torch != torch.__version__:
        raise AttachError(
            f"the teacher has torch {export.torch}, this process {torch.__version__}: CUDA handles are made and opened by one "
            "torch. Install the same in both, or set plane=host."
        )
    if export.pid_namespace != cuda_ipc.pid_namespace():
        raise AttachError(
            "the teacher runs in another PID namespace, where CUDA IPC does not work: start both in one container, or with "
            "the host's (docker run --pid=host), or set plane=host."
        )
    if not (1 <= export.slots == len(export.ready) and export.generation < _GENERATIONS):
        raise AttachError(f"the teacher's export tells {export.slots} slots, {len(export.ready)} events: garbled.")
    if export.memory.nbytes < slab_bytes(export.slots, export.stride):
        raise AttachError(f"the teacher's export tells {export.memory.nbytes} bytes for {export.slots} slots: garbled.")


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
        except _UNOPENED as error:
            raise AttachError(
                f"the rank's events cannot be opened on {slab.device}: {error}. Set plane=host."
            ) from None

    def seal(self, number: int) -> Callable[[], None] | None:
        """Stamp the reply and record its event: it may be published at once. Nothing of it is written any more."""
        self._begin(number)
        slab, slot = self._slab, number % self._slab.slots
        with cuda_ipc.on(self._stream):
            slab.stamps[slot].fill_(_stamp(slab.generation, number))
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
        stamp = _stamp(source.slab.generation, number)
        read = self._reads.prepare(number, stamp, source.teacher, with_beginning=self.keeps)
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
            slab = Opened(export, self._device)
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


def _stamps(memory: torch.Tensor, slots: int, stride: int) -> tuple[torch.Tensor, ...]:
    """() int64 for each slot, behind the slots."""
    start = slots * stride
    with torch.inference_mode(False):
        return memory[start : start + slots * _STAMP_BYTES].view(torch.int64).unbind()


def _sample(memory: torch.Tensor, slots: int, stride: int) -> torch.Tensor:
    end = slab_bytes(slots, stride)
    return memory[end - _SAMPLE_BYTES : end]


def _stamp(generation: int, number: int) -> int:
    return generation * _NUMBERS + number + 1
