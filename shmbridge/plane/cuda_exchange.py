"""How a teacher and a rank hand each other the handles of their GPU memory and events: JSON in the lane's reply segment.

The teacher writes an export when it takes a lane over; the two newest are kept. The rank answers with its own events.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from shmbridge.errors import AttachError
from shmbridge.plane.cuda_ipc import MemoryHandle
from shmbridge.shm import layout
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Names, Shape, Token

T = TypeVar("T", bound=msgspec.Struct)


class Export(msgspec.Struct, frozen=True):
    """What a rank needs to open its lane's slab. It is made once, for that rank alone."""

    torch: str
    pid: int
    start: int  # of the process: see peer.Identity
    pid_namespace: int
    gpu: str  # UUID
    slots: int
    stride: int
    generation: int
    first: int  # number of the first reply, or chunk, that lies in it
    memory: MemoryHandle
    ready: tuple[bytes, ...]  # event handles, one for each slot
    checksum: int  # of the sample in the first slot


class Imported(msgspec.Struct, frozen=True):
    """The rank's answer to an export."""

    free: tuple[bytes, ...]  # event handles, one for each slot


class Exchange:
    """The segment of one lane that holds the handles of its teachers and of its rank."""

    def __init__(self, token: Token, shape: Shape, lane: int) -> None:
        name = Names(token.session_id).reply(token.generation, lane)
        self._segment = segment = Segment.attach(name, layout.REPLY, token.session_id, token.generation, lane)
        self._capacity = layout.exchange_capacity(shape.reply_slots)
        if segment.bytes.nbytes != shape.exchange_bytes:
            raise AttachError(
                f"segment {name} has {segment.bytes.nbytes} bytes, the exchange of CUDA handles takes "
                f"{shape.exchange_bytes}: garbled."
            )

    @property
    def exports(self) -> int:
        """How many exports there were."""
        return self._segment.words[layout.ExchangeWord.EXPORTS]

    @property
    def imported(self) -> int:
        """The export that the rank has answered last."""
        return self._segment.words[layout.ExchangeWord.IMPORTED]

    def write_export(self, export: Export) -> int:
        """Which of the lane's exports it is, from 1 on."""
        nth = self.exports + 1
        self._write(layout.ExchangeWord.EXPORT_NBYTES + (nth - 1) % 2, (nth - 1) % 2, export)
        self._segment.words[layout.ExchangeWord.EXPORTS] = nth
        return nth

    def read_export(self, nth: int) -> Export:
        """Raises AttachError; also where two more exports have taken its place."""
        export = self._read(layout.ExchangeWord.EXPORT_NBYTES + (nth - 1) % 2, (nth - 1) % 2, Export)
        if self.exports > nth + 1:
            raise AttachError(
                f"the lane went through {self.exports - nth} teachers since this rank last read a reply, so the memory of the "
                f"first of them is no longer known: start again from the last checkpoint."
            )
        return export

    def write_imported(self, nth: int, imported: Imported) -> None:
        """The answer to export `nth`."""
        self._write(layout.ExchangeWord.IMPORTED_NBYTES, 2, imported)
        self._segment.words[layout.ExchangeWord.IMPORTED] = nth

    def read_imported(self) -> Imported:
        """The newest answer. Raises AttachError."""
        return self._read(layout.ExchangeWord.IMPORTED_NBYTES, 2, Imported)

    def _write(self, word: int, area: int, what: msgspec.Struct) -> None:
        text = msgspec.json.encode(what)
        assert len(text) <= self._capacity, "exchange_capacity is too small"
        start = layout.PAGE + area * self._capacity
        self._segment.bytes[start : start + len(text)] = text
        self._segment.words[word] = len(text)

    def _read(self, word: int, area: int, kind: type[T]) -> T:
        nbytes = self._segment.words[word]
        start = layout.PAGE + area * self._capacity
        if nbytes > self._capacity:
            raise AttachError(f"segment {self._segment.name} tells {nbytes} bytes of CUDA handles: garbled.")
        try:
            return msgspec.json.decode(bytes(self._segment.bytes[start : start + nbytes]), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise AttachError(f"segment {self._segment.name} holds garbled CUDA handles: {error}.") from None
