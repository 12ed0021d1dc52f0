"""Who waits for whom: the share of a step that a rank spends waiting for the teacher, and a verdict."""

from __future__ import annotations

import time
from typing import NamedTuple

from shmbridge import trace
from shmbridge.ring import Composition

_NOTICEABLE = 0.02


class Stats(NamedTuple):
    """What a rank's replies took. A step is what happens from one reply to the next."""

    replies: int = 0
    elapsed_s: float = 0.0
    waited_s: float = 0.0  # this rank slept for the teacher
    teacher_s: float = 0.0  # the forwards that answered it
    padding: float = 0.0  # share of those forwards, a mean

    @property
    def step_s(self) -> float:
        return self.elapsed_s / self.replies if self.replies else 0.0

    @property
    def wait_share(self) -> float:
        """Of the step, 0 to 1."""
        return self.waited_s / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def verdict(self) -> str:
        """Teacher or student is the longer, and by how much a step."""
        if not self.replies:
            return "no reply yet"
        waited, teacher = self.waited_s / self.replies, self.teacher_s / self.replies
        if self.wait_share > _NOTICEABLE:
            return f"the teacher is the longer, by {_ms(waited)} a step of {_ms(self.step_s)}"
        spare = max(0.0, self.step_s - teacher)
        return f"the student is the longer, by {_ms(spare)} a step of {_ms(self.step_s)}"

    def __str__(self) -> str:
        padding = f"; {self.padding:.0%} of the teacher's tokens were padding" if self.padding >= 0.005 else ""
        return f"{self.wait_share:.0%} of the step waiting for the teacher: {self.verdict}{padding}"


class Meter:
    """Counts, and logs one line every `every` replies (0: none)."""

    def __init__(self, every: int) -> None:
        self._every = every
        self.reset()

    def reset(self) -> None:
        """Count from now on."""
        self._started = time.monotonic()
        self._all = Stats()
        self._begin_window(self._started)

    def _begin_window(self, now: float) -> None:
        self._window_started = now
        self._replies = 0
        self._waited_s = self._teacher_ns = self._padding = 0.0

    def _window(self, elapsed_s: float = 0.0) -> Stats:
        padding = self._padding / self._replies if self._replies else 0.0
        return Stats(self._replies, elapsed_s, self._waited_s, self._teacher_ns / 1e9, padding)

    def waited(self, seconds: float) -> None:
        self._waited_s += seconds

    def replied(self, step: int | None, composition: Composition) -> None:
        self._replies += 1
        self._teacher_ns += composition.forward_ns
        self._padding += composition.padded_fraction
        if self._replies == self._every:
            now = time.monotonic()
            at = f"reply {self._all.replies + self._every}" if step is None else f"step {step}"
            trace.logger.info("%s: %s", at, self._window(now - self._window_started))
            self._all = _sum(self._all, self._window())
            self._begin_window(now)

    def total(self) -> Stats:
        """Since the last reset, up to now."""
        return _sum(self._all, self._window())._replace(elapsed_s=time.monotonic() - self._started)


def _sum(a: Stats, b: Stats) -> Stats:
    replies = a.replies + b.replies
    padding = (a.padding * a.replies + b.padding * b.replies) / replies if replies else 0.0
    return Stats(replies, 0.0, a.waited_s + b.waited_s, a.teacher_s + b.teacher_s, padding)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
