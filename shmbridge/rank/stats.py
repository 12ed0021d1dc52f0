"""Who waits for whom: what a rank's steps take, the share that it waits for the teacher, a verdict, and what to change."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from statistics import median
from typing import NamedTuple

from shmbridge import log
from shmbridge.shm.ring import Composition

# Below these shares of a step the verdict is `balanced`: a rank that waits less loses nothing worth a change, and a teacher
# that computes for more of the step has little to spare.
WAITING, BUSY = 0.05, 0.5
_SHORTER = 0.9  # of the step: what an overlap must promise before it is advised
_KEPT_STEPS = 1000


class Stats(NamedTuple):
    """What a rank's replies took, all times in seconds.

    A step is everything between the first replies to two successive values of `step` (submit, exchange, prefetch); where
    the loop gives none, every reply is a step. Times of a step are medians, so a loader that starts, an evaluation or a
    checkpoint does not count; a step is measured once the next has begun.
    """

    replies: int = 0
    elapsed_s: float = 0.0
    waited_s: float = 0.0  # this rank slept for the teacher
    teacher_s: float = 0.0  # the forwards that answered it
    padding: float = 0.0  # share of those forwards, a mean
    steps: int = 0  # that were measured
    step_s: float = 0.0
    step_waited_s: float = 0.0
    step_teacher_s: float = 0.0
    unit: str = "reply"  # `step` where the loop gives one

    @property
    def wait_share(self) -> float:
        """The share of a step that the rank waits for the teacher, 0 to 1."""
        return self.step_waited_s / self.step_s if self.step_s else 0.0

    @property
    def verdict(self) -> str:
        """Whether teacher or student takes longer, and by how much; or that they are balanced."""
        if not self.steps:
            return "no reply yet" if not self.replies else f"no {self.unit} has been measured yet"
        of = f"a {self.unit} of {_ms(self.step_s)}"
        if self.wait_share >= WAITING:
            return f"the teacher takes longer, by {_ms(self.step_waited_s)} of {of}"
        if self.step_teacher_s < BUSY * self.step_s:
            return f"the student takes longer, by {_ms(self.step_s - self.step_teacher_s)} of {of}"
        return f"balanced: the teacher computes for {_ms(min(self.step_teacher_s, self.step_s))} of {of}"

    @property
    def advice(self) -> str:
        """What would make the steps shorter; empty where nothing in the bridge would."""
        if self.wait_share < WAITING:
            return ""
        overlapped_s = max(self.step_s - self.step_waited_s, self.step_teacher_s)
        if overlapped_s < _SHORTER * self.step_s:
            return (
                f"read ahead (bridge.prefetch, and a larger ring.depth where a step has several batches): the {self.unit} "
                f"could take as little as {_ms(overlapped_s)}"
            )
        return (
            "the teacher is the limit: give it more GPUs (teacher.gpus, teacher.replicas), teacher.compile=true, "
            "or fewer positions (submit's `positions`)"
        )

    def __str__(self) -> str:
        padding = f"; {self.padding:.0%} of the teacher's tokens were padding" if self.padding >= 0.005 else ""
        return f"{self.wait_share:.0%} of a {self.unit} waiting for the teacher; {self.verdict}{padding}"


class _Counts:
    """What came since a moment: replies, and the steps that were measured as (seconds, waited, of the teacher)."""

    def __init__(self) -> None:
        self.replies = 0
        self.padding = 0.0  # a sum over the replies
        self.steps: deque[tuple[float, float, float]] = deque(maxlen=_KEPT_STEPS)

    def stats(self, unit: str, steps: Collection[tuple[float, float, float]]) -> Stats:
        step_s, waited_s, teacher_s = map(median, zip(*steps, strict=True)) if steps else (0.0, 0.0, 0.0)
        padding = self.padding / self.replies if self.replies else 0.0
        return Stats(self.replies, 0.0, 0.0, 0.0, padding, len(self.steps), step_s, waited_s, teacher_s, unit)


class Meter:
    """Counts, and logs one line every `every` replies (0: none)."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.reset()

    def reset(self) -> None:
        """Count from now on."""
        self._started = time.monotonic()
        self._waited_s = self._teacher_s = 0.0
        self._total, self._window = _Counts(), _Counts()  # the window: since the last line
        self._unit = "reply"
        self._step: int | None = None  # the one in progress
        self._begun: tuple[float, float, float] | None = None  # the time and the sums at its first reply
        self._advised = ""

    def waited(self, seconds: float) -> None:
        self._waited_s += seconds

    def replied(self, step: int | None, composition: Composition) -> None:
        """A reply has come. It ends a step where it is the first of the next: where `step` is another one, or none is told."""
        if self._begun is None or self._step is None or step not in (None, self._step):
            now = time.monotonic(), self._waited_s, self._teacher_s
            if self._begun is not None:
                elapsed_s, waited_s, teacher_s = (
                    after - before for after, before in zip(now, self._begun, strict=True)
                )
                for counts in (self._total, self._window):
                    counts.steps.append((elapsed_s, waited_s, teacher_s))
            self._begun, self._step = now, step
            if step is not None:
                self._unit = "step"
        self._teacher_s += composition.forward_ns / 1e9
        for counts in (self._total, self._window):
            counts.replies += 1
            counts.padding += composition.padded_fraction
        if self.every and self._window.replies == self.every:
            self._tell(step)

    def _tell(self, step: int | None) -> None:
        found = self._window.stats(self._unit, self._window.steps or list(self._total.steps)[-1:])
        at = f"reply {self._total.replies}" if step is None else f"step {step}"
        advice = found.advice
        is_new = advice.partition(":")[0] != self._advised.partition(":")[0]
        log.logger.info("%s: %s%s", at, found, f"; {advice}" if advice and is_new else "")
        self._advised = advice
        self._window = _Counts()

    def total(self) -> Stats:
        """Since the last reset, up to now; medians are of the last 1000 steps."""
        return self._total.stats(self._unit, self._total.steps)._replace(
            elapsed_s=time.monotonic() - self._started, waited_s=self._waited_s, teacher_s=self._teacher_s
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
