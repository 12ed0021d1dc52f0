"""How long the teacher's device takes for a forward, without its host waiting for it."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch


class Stopwatch(Protocol):
    def start(self) -> None:
        """A forward begins."""

    def stop(self) -> int:
        """It has been computed, or launched; its nanoseconds."""


class HostWatch:
    """Of a teacher on the CPU, where a forward that has returned is over."""

    def __init__(self) -> None:
        self._started_ns = 0

    def start(self) -> None:
        self._started_ns = time.monotonic_ns()

    def stop(self) -> int:
        return time.monotonic_ns() - self._started_ns


class GpuWatch:
    """Of a teacher on a GPU, where a forward has only been launched: the time of the latest one that is over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began = self._event()
        self._latest_ns = 0

    def start(self) -> None:
        self._began = self._event()
        self._began.record(torch.cuda.current_stream(self._device))

    def stop(self) -> int:
        ended = self._event()
        ended.record(torch.cuda.current_stream(self._device))
        self._running.append((self._began, ended))
        while self._running and self._running[0][1].query():
            began, ended = self._running.popleft()
            self._latest_ns = round(began.elapsed_time(ended) * 1e6)
        return self._latest_ns

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)


def of(device: torch.device) -> Stopwatch:
    return GpuWatch(device) if device.type == "cuda" else HostWatch()
