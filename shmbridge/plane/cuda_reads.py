"""The replies that a rank's GPU still reads, as its host sees them: by words in pinned host memory, without a call of CUDA.

Before a read is launched the host writes a sentinel into the read's word, and the stream overwrites it behind the payload with
whether the stamp was wrong. The watchdog's thread looks at these words too. An event query there would make a context on GPU 0,
and could itself wait for the stream that is stuck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from shmbridge.errors import TornReply
from shmbridge.shm.process import Identity

ON_THEIR_WAY = 256  # reads; a host that runs further ahead of its GPU waits for the oldest
_PENDING, _TORN = 2, 1  # bytes of a word; a stream writes False or True


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
