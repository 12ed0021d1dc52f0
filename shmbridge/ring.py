"""One lane's cursors and slots over plain memory. Nothing here blocks, and nothing here calls the kernel.

The transitions follow the Disruptor: each cursor has one writer, only grows, and is stored after the data that it
announces. layout.py draws the bytes and the states.

    rank      claim -> write_request -> publish_request      read_reply -> release
    teacher   next_request -> read_request -> write_reply -> publish_reply

Everything read from memory that the other side writes is checked before it is used: a garbled word raises AttachError,
it never becomes an offset.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from shmbridge.errors import AttachError, RingFull
from shmbridge.layout import (
    ANSWERED,
    ERROR_CAPACITY,
    ERROR_OFFSET,
    NO_STEP,
    RAISED,
    REPLY_HEAD,
    REQUEST,
    REQUEST_DATA,
    LaneLayout,
    LaneWord,
)

_REQUESTED, _CLOSED, _REPLIED = LaneWord.REQUESTED, LaneWord.CLOSED, LaneWord.REPLIED


class Words(Protocol):
    """64-bit words, each loaded and stored whole: memoryview.cast("Q")."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class Request(NamedTuple):
    """What a rank asked. The buffers look into the slot, which stays the teacher's until it publishes the reply."""

    sequence: int
    step: int | None
    batch: int
    seq: int
    itemsize: int  # 4 or 8: int32 or int64 token IDs
    ids: memoryview  # bytes, batch x seq x itemsize
    mask: memoryview | None  # bytes, batch x seq, 0 or 1
    submitted_ns: int


class Composition(NamedTuple):
    """Where a request stood in the teacher's forward: what the bits of its reply depend on.

    A request that was split by rows names its last forward."""

    forward: int
    row: int
    rows: int
    padded_seq: int


class ReplyHead(NamedTuple):
    """What the teacher says about its reply to one request. `error` is the remote traceback, or None."""

    composition: Composition
    error: str | None


class Ring:
    """The ring of one lane of one generation, over the lane segment's memory."""

    def __init__(self, memory: memoryview, words: Words, layout: LaneLayout, generation: int) -> None:
        self.memory = memory
        self.words = words
        self.layout = layout
        self.depth = layout.depth
        self.generation = generation
        self._released = [LaneWord.RELEASED + i * LaneWord.RELEASED_STRIDE for i in range(layout.readers)]
        self._slots = [layout.request(slot) for slot in range(layout.depth)]

    # Cursors

    @property
    def requested(self) -> int:
        return self.words[_REQUESTED]

    @property
    def replied(self) -> int:
        return self.words[_REPLIED]

    @property
    def released(self) -> int:
        """Of the slowest reader."""
        if len(self._released) == 1:
            return self.words[self._released[0]]
        return min(self.words[i] for i in self._released)

    @property
    def closed(self) -> bool:
        """The rank will submit no more."""
        return self.words[_CLOSED] != 0

    def close_requests(self) -> None:
        self.words[_CLOSED] = 1

    # The rank's side

    def claim(self) -> int:
        """The next sequence to submit. Raises RingFull."""
        sequence = self.words[_REQUESTED]
        if sequence - self.released >= self.depth:
            raise RingFull(
                f"{self.depth} requests are in flight and the ring has ring.depth={self.depth} slots; the oldest is "
                f"sequence {self.released}. Wait for its reply and release the lease before you submit again, or raise "
                "ring.depth."
            )
        return sequence

    def write_request(
        self, sequence: int, step: int | None, batch: int, seq: int, ids: memoryview, mask: memoryview | None
    ) -> None:
        """Copy a request (both buffers as bytes) into its slot; the teacher cannot see it yet."""
        slot = self._slots[sequence % self.depth]
        tokens = batch * seq
        data = slot + REQUEST_DATA
        nbytes = len(ids)
        self.memory[data : data + nbytes] = ids
        if mask is not None:
            self.memory[data + nbytes : data + nbytes + tokens] = mask
        REQUEST.pack_into(
            self.memory,
            slot,
            self.generation,
            sequence,
            NO_STEP if step is None else step,
            batch,
            seq,
            nbytes // tokens,
            mask is not None,
            time.monotonic_ns(),
        )

    def publish_request(self, sequence: int) -> None:
        self.words[_REQUESTED] = sequence + 1

    def answered(self, sequence: int) -> bool | None:
        """True once the reply to `sequence` is published, else None."""
        return True if self.words[_REPLIED] > sequence else None

    def read_reply(self, sequence: int) -> ReplyHead:
        """The head of a published reply. Raises AttachError if it is not the reply to `sequence`."""
        offset = self.layout.reply_head(sequence % self.depth)
        head = REPLY_HEAD.unpack_from(self.memory, offset)
        if head[0] != self.generation or head[1] != sequence or head[2] not in (ANSWERED, RAISED):
            raise AttachError(
                f"the reply slot of generation {self.generation}, sequence {sequence} holds generation {head[0]}, "
                f"sequence {head[1]}, status {head[2]}: refused."
            )
        error = None
        if head[2] == RAISED:
            start = offset + ERROR_OFFSET
            error = bytes(self.memory[start : start + min(head[7], ERROR_CAPACITY)]).decode(errors="replace")
        return ReplyHead(Composition(*head[3:7]), error)

    def release(self, sequence: int, reader: int = 0) -> None:
        """Give the slots of all sequences up to and including `sequence` back."""
        self.words[self._released[reader]] = sequence + 1

    # The teacher's side

    def next_request(self) -> int | None:
        """The oldest submitted sequence, or None. Raises AttachError where the cursors contradict each other."""
        requested, replied = self.words[_REQUESTED], self.words[_REPLIED]
        if requested == replied:
            return None
        if not replied < requested <= replied + self.depth:
            raise AttachError(
                f"the lane's cursors are garbled: requested {requested}, replied {replied}, depth {self.depth}."
            )
        return replied

    def read_request(self, sequence: int) -> Request:
        """A submitted request, in place. Raises AttachError if its descriptor is not one that a rank could write."""
        slot = self._slots[sequence % self.depth]
        generation, found, step, batch, seq, itemsize, masked, submitted = REQUEST.unpack_from(self.memory, slot)
        tokens = batch * seq
        if (
            generation != self.generation
            or found != sequence
            or not 0 < tokens <= self.layout.max_tokens
            or itemsize not in (4, 8)
            or masked > 1
        ):
            raise AttachError(
                f"the request slot of generation {self.generation}, sequence {sequence} holds generation {generation}, "
                f"sequence {found}, shape {batch} x {seq}, itemsize {itemsize}, mask {masked}: refused."
            )
        start = slot + REQUEST_DATA
        end = start + tokens * itemsize
        ids = self.memory[start:end]
        mask = self.memory[end : end + tokens] if masked else None
        return Request(sequence, None if step == NO_STEP else step, batch, seq, itemsize, ids, mask, submitted)

    def write_reply(self, sequence: int, composition: Composition, error: str | None = None) -> None:
        """Write a reply's head; its payload is written before, by the plane."""
        text = (error or "").encode(errors="replace")
        if len(text) > ERROR_CAPACITY:  # the end of a traceback tells what was raised
            text = b"...\n" + text[-(ERROR_CAPACITY - 4) :]
        offset = self.layout.reply_head(sequence % self.depth)
        status = ANSWERED if error is None else RAISED
        REPLY_HEAD.pack_into(self.memory, offset, self.generation, sequence, status, *composition, len(text))
        if text:
            start = offset + ERROR_OFFSET
            self.memory[start : start + len(text)] = text

    def publish_reply(self, sequence: int) -> None:
        self.words[_REPLIED] = sequence + 1
