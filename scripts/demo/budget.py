"""A training time in seconds, and the line that shows how much of it is used."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist


class Budget:
    """Spends a training time, the same on all ranks: rank 0 looks at its clock and tells the others.

    The number of steps is not known beforehand, so a schedule follows the share of the time that is used.
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds = seconds
        self._device = device
        self._used = 0.0

    def steps(self, until: float) -> Iterator[float]:
        """The share of the time that is used before each step, from 0, as long as it is below `until`.

        A collective in each step. What happens between two calls of this method is not counted.
        """
        while True:
            share = torch.tensor(self._used / self._seconds, dtype=torch.float64, device=self._device)
            dist.broadcast(share, src=0)
            if share >= until:
                return
            started = time.monotonic()
            yield float(share)
            self._used += time.monotonic() - started


class Line:
    """One line of rank 0: written over itself in a terminal, else printed again every five seconds."""

    def __init__(self, *, terminal: bool) -> None:
        self._terminal = terminal
        self._every_s = 0.5 if terminal else 5.0
        self._next = 0.0

    def show(self, text: str, *, last: bool = False) -> None:
        """`last`: show it in any case and end the line."""
        if dist.get_rank() != 0 or (time.monotonic() < self._next and not last):
            return
        self._next = time.monotonic() + self._every_s
        if self._terminal:
            print(f"\r{text}", end="\n" if last else "", flush=True)
        else:
            print(text, flush=True)


def bar(share: float, width: int = 20) -> str:
    full = round(min(1.0, share) * width)
    return "█" * full + "░" * (width - full)
