"""Simulated devices: time passes, and nothing is computed, so that a few cores can stand for a machine of GPUs.

Work ends at an absolute deadline, the moment it began plus the time it takes; a sleep that is cut short is gone on with. The
timer slack is off, so that what a sleep oversleeps is the wake-up of a process on this machine. That is part of every step,
as nothing is subtracted; how much it was is counted.
"""

from __future__ import annotations

import mmap
import time
from typing import NamedTuple

import numpy as np
import torch

from shmbridge.payload import Batch

WIDTH = 16  # float32 for each position of a reply: 64 KB for 1024 tokens, as much as a top-k of 8 words and IDs
_FIXED, _PER_TOKEN, _COUNTS = 0, 1, 8


class Counts(NamedTuple):
    """Of a teacher, or of several, since they were started."""

    forwards: float = 0.0
    rows: float = 0.0
    device_s: float = 0.0
    late_s: float = 0.0  # of device_s: overslept
    cpu_s: float = 0.0

    def since(self, before: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, before, strict=True)))


class TeacherDevice:
    """The teachers' times, in memory that all forked processes share. `forward` is the model of one teacher."""

    def __init__(self, teachers: int) -> None:
        self._words = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.float64)
        self._teachers = teachers

    def set(self, fixed_s: float, per_token_s: float) -> None:
        """What a forward takes from now on, with the padding counted as tokens."""
        self._words[_FIXED], self._words[_PER_TOKEN] = fixed_s, per_token_s

    def counts(self) -> list[Counts]:
        """Of each teacher."""
        return [Counts(*self._of(teacher).tolist()) for teacher in range(self._teachers)]

    def _of(self, teacher: int) -> np.ndarray:
        start = _COUNTS * (1 + teacher)
        return self._words[start : start + len(Counts._fields)]

    def forward(self, teacher: int, batch: Batch) -> dict[str, torch.Tensor]:
        """Take the time; the answer to a position is its token ID, WIDTH times."""
        began = time.monotonic()
        rows, seq = batch.input_ids.shape
        deadline = began + self._words[_FIXED] + self._words[_PER_TOKEN] * rows * seq
        answer = batch.input_ids.float().unsqueeze(-1).expand(rows, seq, WIDTH)
        late = sleep_until(deadline)
        counts = self._of(teacher)
        counts += (1, rows, deadline - began + late, late, 0)
        counts[-1] = time.process_time()
        return {"answer": answer}


def sleep_until(deadline: float) -> float:
    """Sleep until time.monotonic() is `deadline`; how late it is then, in seconds."""
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)
    return -left


def right(ids: torch.Tensor, answer: torch.Tensor) -> bool:
    """Whether `answer` (1, seq, WIDTH) is the one to `ids` (1, seq)."""
    return bool((answer == ids.unsqueeze(-1)).all())
