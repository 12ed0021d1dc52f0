"""One setting of a run, and what every contestant has to carry in it."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TOKENS = 8192  # int64: 64 KB of IDs for each request of each rank
PLACEMENTS = ("same", "across")
LARGE = 1 << 20  # from this reply size on copies cost more than wake-ups
_MARK = 7.0


@dataclass(frozen=True)
class Cell:
    """What one section of a table measures."""

    placement: str
    ranks: int
    reply_bytes: int
    teacher_core: int
    rank_cores: tuple[int, ...]

    @property
    def large(self) -> bool:
        return self.reply_bytes >= LARGE

    @property
    def core_each(self) -> bool:
        """No two processes share a core."""
        return len({self.teacher_core, *self.rank_cores}) == 1 + self.ranks


def place(placement: str, ranks: int, reply_bytes: int, cores: list[int]) -> Cell:
    """same: everybody on the first core. across: the teacher there alone, the ranks over the others as far as they go."""
    others = cores[:1] if placement == "same" else cores[1:]
    return Cell(placement, ranks, reply_bytes, cores[0], tuple(others[i % len(others)] for i in range(ranks)))


def token_ids() -> torch.Tensor:
    """A rank's (1, TOKENS) int64 IDs, made once."""
    return torch.arange(TOKENS, dtype=torch.int64).reshape(1, TOKENS)


def size_text(nbytes: int) -> str:
    """1024 -> `1 KB`."""
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if nbytes % size == 0:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"


class Model:
    """The teacher's model: a standing answer, so that only the transport is measured.

    `pause_s` lies in memory that the forked processes share; while it is not 0 every forward sleeps that long, which is
    how the CPU time of a waiting rank is measured.
    """

    def __init__(self, reply_bytes: int) -> None:
        self._pause = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self._items = reply_bytes // 4

    @property
    def pause_s(self) -> float:
        return self._pause[0]

    @pause_s.setter
    def pause_s(self, seconds: float) -> None:
        self._pause[0] = seconds

    def answers(self, rows: int = 1) -> torch.Tensor:
        """(rows, reply_bytes / 4) float32, warm."""
        return torch.full((rows, self._items), _MARK)

    def forward(self) -> None:
        """The model's work: none, or a sleep."""
        if self._pause[0]:
            time.sleep(self._pause[0])

    def check(self, reply: Any) -> None:
        """Raise ValueError unless `reply` (tensor or buffer) is one row of `answers`."""
        found = np.asarray(reply).reshape(-1).view(np.float32)
        if found.size != self._items or not (found == _MARK).all():
            raise ValueError(f"a reply of {found.size} items is not the {self._items} items that the teacher gave")


Check = Callable[[Any], None] | None
Ask = Callable[[Check], None]
"""One request and its reply, read; shows the reply to the check where there is one."""
