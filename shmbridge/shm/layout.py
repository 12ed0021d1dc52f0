"""Every byte offset of the shared segments. Pure: no system call is made here, and no other module knows an offset.

Each drawing gives offsets in bytes, what lies there, the names for it below, and who writes it.

Every segment begins with a header of eight 64-bit words, little-endian (Header):

     0 | magic | version | kind | nbytes | session id, two words | generation | index |   the owner

The magic is written last, so a segment whose creator was killed half-way is refused at attach.

CONTROL, one for each session:

     0 +---------------------------------------------------+
       | header                                            |  the owner
    64 | numbers and announcements  ControlWord            |  the owner
  4096 +---------------------------------------------------+
       | settings: the resolved config as JSON             |  the owner, before the generation begins
 65536 +---------------------------------------------------+
       | record of the owner                               |  the owner
 98304 +---------------------------------------------------+
       | a record for each teacher                         |  the teacher, or the owner for one that is gone
       +---------------------------------------------------+

A record, in CONTROL and in LANE:

     0 +---------------------------------------------------+
       | who, where, how far  RecordWord                   |
   256 | name of the declared phase                        |
   512 | the offer as JSON                                 |
 16896 | the failure as JSON                               |
 32768 +---------------------------------------------------+

A text in a record may be replaced. Its writer empties its word, writes the text, and stores a word that differs from all
before; a reader that finds another word after its copy than before it reads again.

LANE, one for each lane and generation. Its members are the processes that share its replies; the first one is its rank, which
alone submits and gives slots back:

     0 +---------------------------------------------------+
       | header                                            |  the owner
    64 | numbers of the lane, who serves it  LaneWord      |  the owner; `teacher` also the teacher that hands it over
   512 | requested, closed                                 |  the rank
   576 | replied, streamed                                 |  the teacher
   640 | released, consumed, abandoned                     |  the rank
  4096 +---------------------------------------------------+
       | a record for each member                          |  that member
       +---------------------------------------------------+
       | depth request slots of request_stride bytes       |  the rank
       |     0  REQUEST                                     |
       |   128  token IDs, then each array of ARRAYS that  |
       |        the request carries, at multiples of WORD  |
       +---------------------------------------------------+  a page begins
       | depth reply heads of 16384 bytes                  |  the teacher
       |     0  REPLY_HEAD                                 |
       |   128  text of the error                          |
       +---------------------------------------------------+
       | chunks chunk heads of 64 bytes, CHUNK_HEAD        |  the teacher
       +---------------------------------------------------+

REPLY, one for each lane and generation. On the host plane the replies lie in it; where they lie in GPU memory, the handles of
both sides, as JSON:

     0 +------------------+     0 +------------------------+
       | header           |       | header  ExchangeWord   |
  4096 +------------------+  4096 +------------------------+
       | reply slots, or  |       | exports 1, 3, 5, ...   |  the teacher
       | chunks where     |       | exports 2, 4, 6, ...   |  the teacher
       | replies stream   |       | answer to the last one |  the rank
       +------------------+       +------------------------+

Where replies lie in GPU memory, each lane has a slab there. A rank checks the sample when it opens the slab of a later teacher,
so no reply writes over it:

    | reply slots, or chunks | a stamp of 8 bytes for each | sample of 4096 bytes |  the teacher

HEAD, one for each session whose payload is hidden: after one page of header, the weight and the bias of the output head.
Teacher 0 writes it before it opens the barrier; everyone else reads it.

The state of slot `sequence % depth` is derived from the cursors, never stored:

    released <= replied <= requested <= released + depth

        sequence >= requested             free
        replied  <= sequence < requested  submitted: the teacher owns the slot
        released <= sequence < replied    answered: the lane's members own the slot
        sequence <  released              free again

Where replies are streamed, chunk `index % chunks` is a slot of its own ring, for all requests of the lane in turn:

    consumed <= streamed <= consumed + chunks

`abandoned` tells that nobody will read the reply to any sequence below it; the teacher then answers without computing.

A cursor is one aligned 64-bit word that only grows and has one writer. It is stored through memoryview.cast("Q"), which
moves the word whole; struct.pack_into must never touch a cursor, because it clears the bytes first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from shmbridge.output_spec import ITEM_BYTES, Extent, HeadSpec, OutputSpec

MAGIC = int.from_bytes(b"SHMBRDGE", "little")
VERSION = 4
PAGE = 4096
CACHE_LINE = 64
WORD = 8

CONTROL, LANE, REPLY, HEAD = 1, 2, 3, 4


class Word:
    """An attribute that is one of the words of its owner's `words`. It is loaded and stored whole."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, owner: Any, kind: type) -> int:
        value: int = owner.words[self._index]
        return value

    def __set__(self, owner: Any, value: int) -> None:
        owner.words[self._index] = value


class Flag(Word):
    """A word that is 0 or 1."""

    def __get__(self, owner: Any, kind: type) -> bool:
        return bool(owner.words[self._index])


class Header:
    """Word indices that all kinds share."""

    MAGIC, VERSION, KIND, NBYTES, SESSION_HIGH, SESSION_LOW, GENERATION, INDEX = range(8)


class ControlWord:
    """Word indices in the control segment."""

    OWNER_PID = 8
    OWNER_START = 9
    LANES = 10
    TEACHERS = 11
    MEMBERS = 12
    DEPTH = 13
    MAX_TOKENS = 14
    MAX_BATCH = 15
    MAX_POSITIONS = 16
    CANDIDATES = 17
    CHUNKS = 18
    CHUNK_POSITIONS = 19
    SETTINGS_NBYTES = 20
    CURRENT_GENERATION = 21
    REPLIES_READY = 22  # the generation whose reply segments exist
    TRAINING_DONE = 23  # the last generation whose training group has ended
    SESSION_ENDING = 24  # no generation follows
    STOPPING = 25  # ranks with a save hook are to save and stop


SETTINGS_OFFSET = PAGE
SETTINGS_CAPACITY = 60 * 1024
RECORDS_OFFSET = 64 * 1024


class RecordWord:
    """Word indices inside a participant's record, relative to its first word."""

    PID = 0
    START = 1
    PHASE = 2
    SINCE_NS = 3
    STEP = 4
    SEQUENCE = 5
    PROGRESS = 6
    PROGRESS_TOTAL = 7
    READY = 8  # teacher: the generation it serves; rank: its generation, once attached
    OFFER = 9  # a text: its bytes, plus 2**32 for each time that it was written; no bytes: none
    FAILURE = 10  # a text
    HEARTBEAT_NS = 11
    DECLARED = 12  # a text: a phase that the script has named
    DECLARED_UNTIL_NS = 13  # until then it is no fault that the loop stands still
    SAVES = 14  # rank: it has a hook to save with before it stops
    LOST = 15  # teacher: no new one will come; written by the owner


RECORD_BYTES = 32 * 1024


class Text(NamedTuple):
    """A text in a record: the word that tells its length, where it lies, and how many bytes fit."""

    word: int
    offset: int
    capacity: int


DECLARED = Text(RecordWord.DECLARED, 256, 64)
OFFER = Text(RecordWord.OFFER, 512, 16 * 1024)
FAILURE = Text(RecordWord.FAILURE, OFFER.offset + OFFER.capacity, RECORD_BYTES - OFFER.offset - OFFER.capacity)


class LaneWord:
    """Word indices in a lane segment."""

    DEPTH = 8
    MEMBERS = 9
    MAX_TOKENS = 10
    TEACHER = 11  # which teacher serves this lane: written by that teacher as it hands the lane over, or by the owner once it is gone
    CANDIDATES = 12
    CHUNKS = 13
    WANTED = 14  # which is to serve it: the owner's word
    REQUESTED = 64
    CLOSED = 65
    REPLIED = 72
    STREAMED = 73
    RELEASED = 80
    CONSUMED = 81
    ABANDONED = 82


LANE_CONSTANTS = (LaneWord.DEPTH, LaneWord.MEMBERS, LaneWord.MAX_TOKENS, LaneWord.CANDIDATES, LaneWord.CHUNKS)

# generation, sequence, step, batch, seq, itemsize of an ID, the arrays that follow (bits in the order of ARRAYS, and
# PROBE), chosen positions, submitted (CLOCK_MONOTONIC, ns)
REQUEST = struct.Struct("<9Q")
REQUEST_DATA = 128
ID_BYTES = 8
# What may travel beside the IDs, with the bytes of one token: masks as 0 and 1, all else as int32.
ARRAYS = {"mask": 1, "positions": 1, "position_ids": 4, "targets": 4, "candidates": 4}
IGNORED = -100  # a target that is none
PROBE = 1 << len(ARRAYS)  # a request of the parity check

# generation, sequence, status, forward, row offset and rows of that forward, its padded length, its tokens without padding,
# its nanoseconds, CRC-32 of the IDs that a probe brought, nbytes of error text
REPLY_HEAD = struct.Struct("<11Q")
REPLY_HEAD_BYTES = 16 * 1024
ERROR_OFFSET = 128
ERROR_CAPACITY = REPLY_HEAD_BYTES - ERROR_OFFSET
ANSWERED, RAISED, SKIPPED = 1, 2, 3  # SKIPPED: nobody wanted it, and nothing was computed


class ExchangeWord:
    """Word indices in a reply segment that carries CUDA handles in place of replies."""

    EXPORTS = 8  # so many teachers have exported, one after the other; the last two exports are kept
    EXPORT_NBYTES = 9  # of every other export, from the second on; the next word is of the others
    IMPORTED = 11  # the export that the rank has answered last, written after the answer
    IMPORTED_NBYTES = 12


def exchange_capacity(slots: int) -> int:
    """Bytes for what one side of a lane exports as JSON: at most 100 for each event handle, and one memory handle."""
    return align(2048 + 160 * slots, PAGE)


STAMP_BYTES = 8  # of a slab
SAMPLE_BYTES = 4096
OWN_BLOCK = 20 * 2**20  # torch's allocator gives smaller requests a part of a block that they share
BLOCK_GRAIN = 2 * 2**20


def slab_bytes(slots: int, stride: int) -> int:
    """Bytes of a slab with `slots` reply slots of `stride` bytes."""
    return slots * (stride + STAMP_BYTES) + SAMPLE_BYTES


def block_bytes(nbytes: int) -> int:
    """Bytes of GPU memory for `nbytes` in an allocation that torch's allocator shares with nothing else."""
    return max(OWN_BLOCK, align(nbytes, BLOCK_GRAIN))


# generation, sequence, first position and number of positions
CHUNK_HEAD = struct.Struct("<4Q")

NO_STEP = 2**64 - 1


def align(nbytes: int, to: int = CACHE_LINE) -> int:
    """The next multiple of `to` bytes."""
    return -(-nbytes // to) * to


def control_bytes(teachers: int) -> int:
    """Size of a control segment in bytes."""
    return RECORDS_OFFSET + (1 + teachers) * RECORD_BYTES


def reply_bytes(slots: int, slot_bytes: int) -> int:
    """Size of a reply segment in bytes."""
    return PAGE + slots * slot_bytes


def reply_offsets(outputs: Sequence[OutputSpec], extent: Extent) -> list[int]:
    """Where each output of a reply begins in its slot, in bytes, and where the last one ends. The outputs lie one after the other,
    each aligned to a cache line."""
    places = [0]
    for spec in outputs:
        places.append(align(places[-1] + (extent.positions if spec.per_token else extent.batch) * spec.item_bytes))
    return places


def head_bias_offset(head: HeadSpec) -> int:
    """Where the bias begins, in bytes behind the first byte of the weight."""
    return align(head.words * head.width * ITEM_BYTES[head.dtype])


def head_bytes(head: HeadSpec) -> int:
    """Bytes of the output head's weight and bias."""
    return head_bias_offset(head) + (head.words * ITEM_BYTES[head.dtype] if head.bias else 0)


@dataclass(frozen=True)
class LaneLayout:
    """Offsets in bytes of one lane: `depth` slots of at most `max_tokens` token IDs with `candidates` IDs per token at most, a
    ring of `chunks` (0 where replies are not streamed), and records of `members` processes."""

    depth: int
    max_tokens: int
    candidates: int = 0
    chunks: int = 0
    members: int = 1

    def record(self, member: int) -> int:
        return PAGE + member * RECORD_BYTES

    def array_bytes(self, name: str, tokens: int) -> int:
        """Bytes of one of ARRAYS for a request of `tokens` tokens."""
        return tokens * ARRAYS[name] * (self.candidates if name == "candidates" else 1)

    @property
    def constants(self) -> tuple[int, ...]:
        """What the lane's words at LANE_CONSTANTS tell."""
        return self.depth, self.members, self.max_tokens, self.candidates, self.chunks

    @cached_property
    def request_stride(self) -> int:
        arrays = sum(align(self.array_bytes(name, self.max_tokens), WORD) for name in ARRAYS)
        return align(REQUEST_DATA + self.max_tokens * ID_BYTES + arrays)

    def request(self, slot: int) -> int:
        return self.record(self.members) + slot * self.request_stride

    def reply_head(self, slot: int) -> int:
        return align(self.request(self.depth), PAGE) + slot * REPLY_HEAD_BYTES

    def chunk_head(self, slot: int) -> int:
        return self.reply_head(self.depth) + slot * CACHE_LINE

    @property
    def nbytes(self) -> int:
        return self.chunk_head(self.chunks)
