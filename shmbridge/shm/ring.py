"""One lane's cursors and slots over plain memory. Nothing here blocks, and nothing here calls the kernel.

The transitions follow the Disruptor: each cursor has one writer, only grows, and is stored after the data that it
announces. layout.py draws the bytes and the states.

    rank      claim -> write_request -> publish_request      read_reply -> release
    teacher   next_request -> read_request -> write_reply -> publish_reply

and, where replies are streamed, between read_request and write_reply

    teacher   has_room -> write_chunk -> publish_chunk
    rank      next_chunk -> consume

Everything read from memory that the other side writes is checked before it is used: a garbled word raises AttachError,
it never becomes an offset.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from shmbridge.errors import AttachError, RingFull
from shmbridge.output_spec import Extent
from shmbridge.shm.layout import (
    ANSWERED,
    ARRAYS,
    CHUNK_HEAD,
    ERROR_CAPACITY,
    ERROR_OFFSET,
    NO_STEP,
    PROBE,
    RAISED,
    REPLY_HEAD,
    REQUEST,
    REQUEST_DATA,
    SKIPPED,
    WORD,
    Flag,
    LaneLayout,
    LaneWord,
    Word,
    align,
)

# Where a request is submitted and answered, words are accessed without the call that an attribute costs.
_REQUESTED, _REPLIED, _RELEASED = LaneWord.REQUESTED, LaneWord.REPLIED, LaneWord.RELEASED
_STREAMED, _CONSUMED = LaneWord.STREAMED, LaneWord.CONSUMED


class Request(NamedTuple):
    """What a rank asked. The buffers look into the slot, which stays the teacher's until it publishes the reply."""

    sequence: int
    step: int | None
    extent: Extent
    itemsize: int  # 4 or 8: int32 or int64 token IDs
    ids: memoryview  # bytes, batch x seq x itemsize
    arrays: dict[str, memoryview]  # bytes, by the names of layout.ARRAYS
    probe: bool
    submitted_ns: int


class Composition(NamedTuple):
    """Where a request stood in the teacher's forward: what the bits of its reply depend on.

    A request that was split by rows names its last forward; `forward_ns` is the time of all. On a GPU, where a forward has only
    been launched when the reply is published, it is the time of the latest that was over then."""

    forward: int
    row: int
    rows: int
    padded_seq: int
    tokens: int  # of all rows, without padding
    forward_ns: int

    @property
    def padded_fraction(self) -> float:
        """The share of the forward's rows x padded_seq that was padding."""
        return 1 - self.tokens / (self.rows * self.padded_seq) if self.rows else 0.0


class ReplyHead(NamedTuple):
    """What the teacher says about its reply to one request. `error` is the remote traceback, or None."""

    composition: Composition
    echo: int  # CRC-32 of the IDs that a probe brought, else 0
    error: str | None


class Chunk(NamedTuple):
    """A piece of a streamed reply: `positions` of them from `start` on, in chunk `number` of the lane."""

    number: int
    start: int
    positions: int


class Ring:
    """The ring of one lane of one generation, over the lane segment's memory."""

    requested = Word(LaneWord.REQUESTED)
    replied = Word(LaneWord.REPLIED)
    released = Word(LaneWord.RELEASED)
    streamed = Word(LaneWord.STREAMED)  # chunks that the teacher has published
    consumed = Word(LaneWord.CONSUMED)  # chunks that the rank has given back
    abandoned = Word(LaneWord.ABANDONED)  # nobody will read the reply to any sequence below it
    closed = Flag(LaneWord.CLOSED)  # the rank will submit no more

    def __init__(self, memory: memoryview, words: memoryview, layout: LaneLayout, generation: int) -> None:
        """`words` is `memory` as 64-bit words, each loaded and stored whole: memoryview.cast("Q")."""
        self.memory = memory
        self.words = words
        self.layout = layout
        self.depth = layout.depth
        self.generation = generation
        self._requests = [layout.request(slot) for slot in range(layout.depth)]
        self._replies = [layout.reply_head(slot) for slot in range(layout.depth)]
        self._chunks = [layout.chunk_head(slot) for slot in range(layout.chunks)]
        self.take_over()

    # The rank's side

    @property
    def free_slots(self) -> int:
        """Requests that can be submitted now."""
        return self.depth - (self.words[_REQUESTED] - self.words[_RELEASED])

    def claim(self) -> int:
        """The next sequence to submit. Raises RingFull."""
        if self.free_slots < 1:
            raise RingFull(
                f"{self.depth} requests are in flight and the ring has ring.depth={self.depth} slots; the oldest is "
                f"sequence {self.released}."
            )
        return self.words[_REQUESTED]

    def write_request(
        self,
        sequence: int,
        step: int | None,
        extent: Extent,
        ids: memoryview,
        arrays: Mapping[str, memoryview] = {},
        *,
        probe: bool = False,
    ) -> None:
        """Copy a request (all buffers as bytes) into its slot; the teacher cannot see it yet."""
        slot = self._requests[sequence % self.depth]
        tokens = extent.batch * extent.seq
        end = slot + REQUEST_DATA + len(ids)
        self.memory[slot + REQUEST_DATA : end] = ids
        carried = PROBE if probe else 0
        if arrays:
            carried += sum(1 << bit for bit, name in enumerate(ARRAYS) if name in arrays)
            for name, place in self._places(end, tokens, carried):
                self.memory[place] = arrays[name]
        head = (
            self.generation,
            sequence,
            NO_STEP if step is None else step,
            extent.batch,
            extent.seq,
            len(ids) // tokens,
        )
        REQUEST.pack_into(self.memory, slot, *head, carried, extent.positions, time.monotonic_ns())

    def publish_request(self, sequence: int) -> None:
        self.words[_REQUESTED] = sequence + 1

    def answered(self, sequence: int) -> bool | None:
        """True once the reply to `sequence` is published, else None."""
        return True if self.words[_REPLIED] > sequence else None

    def read_reply(self, sequence: int) -> ReplyHead:
        """The head of a published reply. Raises AttachError if it is not the reply to `sequence`."""
        offset = self._replies[sequence % self.depth]
        head = REPLY_HEAD.unpack_from(self.memory, offset)
        if head[0] != self.generation or head[1] != sequence or head[2] not in (ANSWERED, RAISED):
            raise AttachError(
                f"the reply slot of generation {self.generation}, sequence {sequence} holds generation {head[0]}, "
                f"sequence {head[1]}, status {head[2]}: refused."
            )
        error = None
        if head[2] == RAISED:
            start = offset + ERROR_OFFSET
            error = bytes(self.memory[start : start + min(head[10], ERROR_CAPACITY)]).decode(errors="replace")
        return ReplyHead(Composition(*head[3:9]), head[9], error)

    def release(self, sequence: int) -> None:
        """Give the slots of all sequences up to and including `sequence` back."""
        self.words[_RELEASED] = sequence + 1

    def abandon(self, sequence: int) -> None:
        """Tell that nobody will read the replies of all sequences up to and including `sequence`."""
        self.abandoned = sequence + 1

    def next_chunk(self, sequence: int) -> Chunk | None:
        """The oldest chunk of the reply to `sequence` that is not consumed, or None. Raises AttachError.

        Chunks of earlier replies, which were abandoned, are consumed on the way. What stands in it is for the caller to check.
        """
        words, chunks = self.words, self.layout.chunks
        while (index := words[_CONSUMED]) != words[_STREAMED]:
            generation, found, start, count = CHUNK_HEAD.unpack_from(self.memory, self._chunks[index % chunks])
            if generation == self.generation and found > sequence and words[_REPLIED] > sequence:
                return None  # the reply to `sequence` is over: a lane's replies are streamed in order
            if generation != self.generation or found > sequence or not index < words[_STREAMED] <= index + chunks:
                raise AttachError(
                    f"chunk {index} of generation {self.generation}, sequence {sequence} holds generation {generation}, "
                    f"sequence {found}: refused."
                )
            if found == sequence:
                return Chunk(index, start, count)
            self.consume(index)
        return None

    def consume(self, index: int) -> None:
        """Give chunk `index` and all before it back."""
        self.words[_CONSUMED] = index + 1

    # The teacher's side

    def take_over(self) -> None:
        """Go on where the lane's last teacher stopped."""
        self._sealed = self.replied  # sequences below it are answered, though perhaps not yet published
        self.filled = self.streamed  # chunks written, though perhaps not yet published

    @property
    def settled(self) -> bool:
        """All that this teacher has written is published."""
        return self.replied >= self._sealed and self.streamed == self.filled

    def streamed_of(self, sequence: int) -> int:
        """How many positions of the reply to `sequence` are published as chunks."""
        streamed = self.streamed
        if not streamed or not self._chunks:
            return 0
        offset = self._chunks[(streamed - 1) % self.layout.chunks]
        generation, found, start, count = CHUNK_HEAD.unpack_from(self.memory, offset)
        return start + count if (generation, found) == (self.generation, sequence) else 0

    def next_request(self) -> int | None:
        """The oldest submitted sequence that is not answered, or None. Raises AttachError where the cursors contradict each other."""
        abandoned = self.abandoned  # before `requested`, which it never passes
        requested, replied = self.words[_REQUESTED], self.words[_REPLIED]
        if requested == replied:
            return None
        if not replied < requested <= replied + self.depth or abandoned > requested:
            raise AttachError(
                f"the lane's cursors are garbled: requested {requested}, replied {replied}, abandoned {abandoned}, depth "
                f"{self.depth}."
            )
        first = max(replied, self._sealed)
        return first if first < requested else None

    def read_request(self, sequence: int) -> Request:
        """A submitted request, in place. Raises AttachError if its descriptor is not one that a rank could write."""
        slot = self._requests[sequence % self.depth]
        head = REQUEST.unpack_from(self.memory, slot)
        generation, found, step, batch, seq, itemsize, carried, count, submitted = head
        tokens = batch * seq
        if (
            generation != self.generation
            or found != sequence
            or not 0 < tokens <= self.layout.max_tokens
            or itemsize not in (4, 8)
            or carried >= PROBE << 1
            or count > tokens
        ):
            raise AttachError(
                f"the request slot of generation {self.generation}, sequence {sequence} holds generation {generation}, "
                f"sequence {found}, shape {batch} x {seq}, itemsize {itemsize}, arrays {carried:#x}, {count} positions: "
                "refused."
            )
        start = slot + REQUEST_DATA
        end = start + tokens * itemsize
        arrays = {name: self.memory[place] for name, place in self._places(end, tokens, carried)} if carried else {}
        extent = Extent(batch, seq, count if "positions" in arrays else None)
        step = None if step == NO_STEP else step
        return Request(
            sequence, step, extent, itemsize, self.memory[start:end], arrays, bool(carried & PROBE), submitted
        )

    def _places(self, at: int, tokens: int, carried: int) -> Iterator[tuple[str, slice]]:
        """Where the arrays of a request of `tokens` tokens lie; `at` is the end of its IDs."""
        for bit, name in enumerate(ARRAYS):
            if carried & 1 << bit:
                at = align(at, WORD)
                end = at + self.layout.array_bytes(name, tokens)
                yield name, slice(at, end)
                at = end

    def has_room(self) -> bool:
        """Whether a chunk is free."""
        return self.filled - self.consumed < self.layout.chunks

    def write_chunk(self, sequence: int, start: int, count: int) -> None:
        """Write the head of chunk number `filled`; its payload is written before, by the plane."""
        offset = self._chunks[self.filled % self.layout.chunks]
        CHUNK_HEAD.pack_into(self.memory, offset, self.generation, sequence, start, count)
        self.filled += 1

    def publish_chunk(self) -> None:
        """Publish the oldest chunk that is written and not published."""
        self.streamed += 1

    def skip_reply(self, sequence: int) -> None:
        """Write the head of a reply that nobody wants; whoever reads it all the same is refused."""
        offset = self._replies[sequence % self.depth]
        REPLY_HEAD.pack_into(self.memory, offset, self.generation, sequence, SKIPPED, *[0] * 8)

    def write_reply(self, sequence: int, composition: Composition, error: str | None = None, echo: int = 0) -> None:
        """Write a reply's head; its payload is written before, by the plane."""
        text = (error or "").encode(errors="replace")
        if len(text) > ERROR_CAPACITY:  # the end of a traceback tells what was raised
            text = b"...\n" + text[-(ERROR_CAPACITY - 4) :]
        offset = self._replies[sequence % self.depth]
        status = ANSWERED if error is None else RAISED
        REPLY_HEAD.pack_into(self.memory, offset, self.generation, sequence, status, *composition, echo, len(text))
        if text:
            start = offset + ERROR_OFFSET
            self.memory[start : start + len(text)] = text

    def seal_reply(self, sequence: int) -> None:
        """The reply is written; it will be published, in the order of sequences."""
        self._sealed = sequence + 1

    def publish_reply(self, sequence: int) -> None:
        self.words[_REPLIED] = sequence + 1
