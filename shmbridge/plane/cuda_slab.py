"""The GPU memory in which the replies of one lane lie, and how the teacher hands it to the rank.

The handles of memory and events are JSON in the lane's reply segment. The teacher writes an export when it takes a lane over;
the two newest are kept. The rank answers with its own events.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
import torch

from shmbridge.errors import AttachError, PlanError
from shmbridge.plane import cuda_ipc
from shmbridge.plane.base import LaneSpec
from shmbridge.plane.cuda_ipc import MemoryHandle
from shmbridge.shm import layout, process
from shmbridge.shm.layout import ExchangeWord
from shmbridge.shm.process import Identity

T = TypeVar("T", bound=msgspec.Struct)

_GENERATIONS = 2**20  # a stamp is generation * 2**43 + number + 1, an int64
_NUMBERS = 2**43

# Three areas of the exchange: every other export in one of the first two, the rank's answer in the third.
_ANSWER = 2
_NBYTES = (ExchangeWord.EXPORT_NBYTES, ExchangeWord.EXPORT_NBYTES + 1, ExchangeWord.IMPORTED_NBYTES)

# What torch raises for handles that do not open: the errors of CUDA, and its own where a handle is garbled.
UNOPENED = (RuntimeError, TypeError, ValueError, OverflowError)


class Export(msgspec.Struct, frozen=True):
    """What a rank needs to open its lane's slab. It is made once, for that rank only."""

    torch: str
    pid: int
    start: int  # of the process: see Identity
    pid_namespace: int
    gpu: str  # UUID
    slots: int
    stride: int
    generation: int
    first: int  # number of the first reply, or chunk, that lies in it
    memory: MemoryHandle
    ready: tuple[bytes, ...]  # event handles, one for each slot
    checksum: int  # of the sample

    @property
    def teacher(self) -> Identity:
        return Identity(self.pid, self.start)


class Imported(msgspec.Struct, frozen=True):
    """The rank's answer to an export."""

    free: tuple[bytes, ...]  # event handles, one for each slot


class Slab:
    """Teacher: the reply slots of one lane in this GPU's memory, kept for the life of the process."""

    def __init__(self, device: torch.device, slots: int, stride: int, generation: int) -> None:
        """Allocate, and leave a sample behind the slots for the rank to check. Raises PlanError."""
        self.device = device
        self.slots, self.stride, self.generation = slots, stride, generation
        nbytes = layout.slab_bytes(slots, stride)
        try:
            self.memory = cuda_ipc.allocate(nbytes, device)
        except torch.OutOfMemoryError:
            raise PlanError(
                f"the reply slots of one rank take {nbytes / 2**20:,.0f} MiB, which {device} of the teacher does not have. Lower "
                "ring.depth or ring.max_tokens, send less (payload.topk={}), or set plane=host."
            ) from None
        self.stream = cuda_ipc.side_stream(device)
        self.stamps, sample = _behind_slots(self.memory, slots, stride)
        self.ready = [cuda_ipc.shared_event(device) for _ in range(slots)]
        sample.copy_(torch.arange(len(sample), device=device) % 251)
        self._checksum = int(sample.sum())
        self.ready[0].record(cuda_ipc.current_stream(device))

    def export(self, first: int = 0) -> Export:
        """The export for one importer, which finds the replies from number `first` on in this slab."""
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


Slabs = dict[int, Slab]
"""The slabs that a teacher's process has exported, by lane; they outlive generations."""


class Opened:
    """Rank: a slab of the teacher, opened on this rank's own device."""

    def __init__(self, export: Export, device: torch.device) -> None:
        """Open the memory and the events, wait for the first event, and compare the sample.

        Raises:
            AttachError: what does not match, or what CUDA said, with the remedy.
        """
        _check(export)
        self.teacher, self.first = export.teacher, export.first
        self.slots, self.stride, self.generation = export.slots, export.stride, export.generation
        try:
            self.memory = cuda_ipc.open_memory(export.memory, device)
            self.ready = [cuda_ipc.open_event(handle, device) for handle in export.ready]
            stream = cuda_ipc.side_stream(device)  # the current one may wait for a teacher that is gone
            stream.wait_event(self.ready[0])
            self.stamps, sample = _behind_slots(self.memory, self.slots, self.stride)
            with cuda_ipc.on(stream):
                found = int(sample.sum())
        except UNOPENED as error:
            raise AttachError(
                f"GPU {export.gpu} cannot be read from {device}: {error}. Set plane=host, which goes through host memory."
            ) from None
        if found != export.checksum:
            raise AttachError(
                f"{device} reads {found} from GPU {export.gpu}, where {export.checksum} was written: access between the two is "
                "broken. Set plane=host, which goes through host memory."
            )


def _check(export: Export) -> None:
    """Raise AttachError where the two processes differ in what CUDA IPC needs alike, or the export is garbled."""
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
    slots, events, stride, nbytes = export.slots, len(export.ready), export.stride, export.memory.nbytes
    if not (1 <= slots == events and export.generation < _GENERATIONS and nbytes >= layout.slab_bytes(slots, stride)):
        raise AttachError(
            f"the teacher's export tells {slots} slots of {stride} bytes, {events} events, {nbytes} bytes of memory: garbled."
        )


def _behind_slots(memory: torch.Tensor, slots: int, stride: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The stamp of each slot, () int64, and the sample, uint8."""
    stamps, sample = slots * stride, slots * (stride + layout.STAMP_BYTES)
    with torch.inference_mode(False):
        return memory[stamps:sample].view(torch.int64).unbind(), memory[sample : sample + layout.SAMPLE_BYTES]


def stamp(generation: int, number: int) -> int:
    """The stamp of reply (or chunk) `number`. No other reply of the session has it."""
    return generation * _NUMBERS + number + 1


class Exchange:
    """The segment of one lane that holds the handles of its teachers and of its rank."""

    def __init__(self, spec: LaneSpec) -> None:
        """Attach the lane's reply segment. Raises AttachError."""
        segment, capacity = spec.attach(spec.shape.exchange_bytes), layout.exchange_capacity(spec.shape.reply_slots)
        self._name, self._words = segment.name, segment.words
        starts = [layout.PAGE + area * capacity for area in range(len(_NBYTES))]
        self._areas = [segment.bytes[start : start + capacity] for start in starts]

    @property
    def exports(self) -> int:
        """How many exports were written; also the number of the newest."""
        return self._words[ExchangeWord.EXPORTS]

    @property
    def imported(self) -> int:
        """The number of the export that the rank has answered last."""
        return self._words[ExchangeWord.IMPORTED]

    def write_export(self, export: Export) -> int:
        """Write the lane's next export. Returns its number, from 1 on."""
        nth = self.exports + 1
        self._write((nth - 1) % 2, export)
        self._words[ExchangeWord.EXPORTS] = nth
        return nth

    def read_export(self, nth: int) -> Export:
        """Export `nth`. Raises AttachError, also where two later exports have taken its place."""
        export = self._read((nth - 1) % 2, Export)
        if self.exports > nth + 1:
            raise AttachError(
                f"the lane went through {self.exports - nth} teachers since this rank last read a reply, so the memory of the "
                f"first of them is no longer known: start again from the last checkpoint."
            )
        return export

    def write_imported(self, nth: int, imported: Imported) -> None:
        """Answer export `nth`."""
        self._write(_ANSWER, imported)
        self._words[ExchangeWord.IMPORTED] = nth

    def read_imported(self) -> Imported:
        """The newest answer. Raises AttachError."""
        return self._read(_ANSWER, Imported)

    def _write(self, area: int, what: msgspec.Struct) -> None:
        text = msgspec.json.encode(what)
        self._areas[area][: len(text)] = text  # raises ValueError where exchange_capacity is too small
        self._words[_NBYTES[area]] = len(text)

    def _read(self, area: int, kind: type[T]) -> T:
        nbytes = self._words[_NBYTES[area]]
        try:
            return msgspec.json.decode(bytes(self._areas[area][:nbytes]), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise AttachError(f"segment {self._name} holds garbled CUDA handles: {error}.") from None
