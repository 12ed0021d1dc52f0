"""A data-parallel training group and its teachers, with simulated devices and the real Owner, Server and Bridge.

A step of a rank is a third of its device time for the forward, the reply, two thirds for loss and backward, and a meeting
of all ranks, which stands for the all-reduce of the gradients: nobody begins the next step before all have ended this one.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.multiprocessing as mp

from benchmarks.device import Counts, TeacherDevice, right, sleep_until
from benchmarks.processes import Failed, Processes, precise_sleeps, uninterrupted
from shmbridge import config, teacher_job
from shmbridge.bridge import Bridge
from shmbridge.owner import Owner
from shmbridge.session import TeacherSession, TrainerSession

TOKENS = 1024  # of each request
FORWARD_SHARE = 1 / 3
_TAIL = 2  # steps behind the measured ones, so that a prefetch is ahead to the end


class Order(NamedTuple):
    """A turn of a group."""

    way: str
    student_s: float
    warm: int
    steps: int
    meets: bool = True  # at the end of each step
    apart_s: float = 0.0  # ranks ask up to that much later than they could, each step anew


class Turn(NamedTuple):
    """What a rank saw of the measured steps, of the teachers as well."""

    elapsed_s: float
    cpu_s: float
    replies: int  # of all steps, the unmeasured ones too
    wrong: int
    teachers: list[Counts]


class Sample(NamedTuple):
    """A turn of a group, in figures of one step."""

    step_s: float
    forwards: float  # of all teachers
    rows: float  # of one forward
    busy: float  # share of the step in which the busiest teacher's device works
    late_s: float  # overslept by that device
    teacher_cpu: float  # cores, of all teachers together
    ranks_cpu: float  # cores, of all ranks together
    replies: int  # of the whole turn, each the right one


def sample(turns: Sequence[Turn], steps: int) -> Sample:
    """What the ranks' turns come to; the teachers are seen by rank 0."""
    elapsed, teachers = statistics.mean(turn.elapsed_s for turn in turns), turns[0].teachers
    forwards = sum(counts.forwards for counts in teachers)
    busiest = max(teachers, key=lambda counts: counts.device_s)
    return Sample(
        step_s=elapsed / steps,
        forwards=forwards / steps,
        rows=sum(counts.rows for counts in teachers) / forwards if forwards else 0.0,
        busy=busiest.device_s / elapsed,
        late_s=busiest.late_s / steps,
        teacher_cpu=sum(counts.cpu_s for counts in teachers) / elapsed,
        ranks_cpu=sum(turn.cpu_s for turn in turns) / elapsed,
        replies=sum(turn.replies for turn in turns),
    )


def median(samples: Sequence[Sample]) -> Sample:
    """Field by field; the replies are all of them."""
    *middle, _ = (statistics.median(values) for values in zip(*samples, strict=True))
    return Sample(*middle, sum(one.replies for one in samples))


class Meeting:
    """A barrier of a few semaphores: all report to rank 0, which lets them go."""

    def __init__(self, ranks: int) -> None:
        fork = mp.get_context("fork")
        self._arrived = fork.Semaphore(0)
        self._go = [fork.Semaphore(0) for _ in range(1, ranks)]

    def wait(self, rank: int) -> None:
        if rank:
            self._arrived.release()
            self._go[rank - 1].acquire()
            return
        for _ in self._go:
            self._arrived.acquire()
        for go in self._go:
            go.release()


class Group:
    """Ranks and their teachers, alive until `stop`; they take turns with those of other groups."""

    def __init__(self, ranks: int, teachers: int, overrides: Sequence[str], scratch: Path, patience_s: float) -> None:
        self.ranks = ranks
        self.device = TeacherDevice(teachers)
        settings = [
            "teacher.model=bench:simulated",
            f"ring.max_tokens={TOKENS}",
            "ring.max_batch=1",
            "parity=false",
            "log.stats_every=0",
        ]
        self._owner = Owner(config.load(overrides=[*settings, *overrides]), ranks, teachers)
        self._token = self._owner.start_generation()
        self._meeting = Meeting(ranks)
        self._processes = Processes(scratch, patience_s)
        self._teachers = teachers

    def start(self) -> None:
        """Fork and connect. Raises Failed; `stop` is due in any case."""
        for index in range(self._teachers):
            self._processes.fork(partial(self._teach, index))
        for index in range(self.ranks):
            self._processes.fork_with_pipe(partial(self._train, index))
        self._owner.create_replies(self._processes.until(self._owner.offered))
        self._processes.collect()

    def turn(self, order: Order, fixed_s: float = 0.0, per_token_s: float = 0.0) -> Sample:
        """Every rank makes its steps; a teacher's forward takes `fixed_s`, and `per_token_s` for each token. Raises Failed."""
        self.device.set(fixed_s, per_token_s)
        self._processes.send(order)
        turns: list[Turn] = self._processes.collect()
        wrong = sum(turn.wrong for turn in turns)
        if wrong:
            raise Failed(f"{wrong} replies were not the answer to their request")
        return sample(turns, order.steps)

    def stop(self) -> None:
        """End the processes and remove the session."""
        self._processes.stop()
        self._owner.close()

    # In the children

    def _teach(self, index: int) -> None:
        precise_sleeps()
        session = TeacherSession(self._token, index)
        teacher_job.serve(session, partial(self.device.forward, index), torch.device("cpu"))

    def _train(self, index: int, pipe: Connection) -> None:
        precise_sleeps()
        with Bridge(TrainerSession(self._token, index)) as bridge:
            bridge.wait_ready()
            pipe.send(None)
            while (order := pipe.recv()) is not None:
                pipe.send(self._measure(index, bridge, order))

    def _measure(self, index: int, bridge: Bridge, order: Order) -> Turn:
        student = _Student(index, order)
        steps = WAYS[order.way](bridge, student, order.warm + order.steps + _TAIL)
        self._meeting.wait(index)
        meet = self._meeting.wait if order.meets else lambda _: None
        for _ in itertools.islice(steps, order.warm):
            meet(index)
        began, cpu, before = time.monotonic(), time.process_time(), self.device.counts()
        for _ in itertools.islice(steps, order.steps):
            meet(index)
        elapsed_s, cpu_s, after = time.monotonic() - began, time.process_time() - cpu, self.device.counts()
        for _ in steps:
            meet(index)
        teachers = [now.since(then) for now, then in zip(after, before, strict=True)]
        return Turn(elapsed_s, cpu_s, student.replies, student.wrong, teachers)


@contextmanager
def alive(patience_s: float) -> Iterator[Callable[..., Group]]:
    """A function that starts a Group(ranks, teachers, overrides); all are stopped at the end, whatever happens."""
    with ExitStack() as undo:

        def start(ranks: int, teachers: int, overrides: Sequence[str] = ()) -> Group:
            scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="shmbridge-bench-")))
            group = Group(ranks, teachers, overrides, scratch, patience_s)
            undo.callback(group.stop)
            group.start()
            return group

        try:
            yield start
        finally:
            with uninterrupted():
                undo.close()


class _Student:
    """A rank's model: it sleeps, and looks at every reply."""

    def __init__(self, rank: int, order: Order) -> None:
        self._ids = torch.arange(TOKENS).reshape(1, TOKENS) + 1_000_000 * rank
        self._step_s, self._apart_s = order.student_s, order.apart_s
        self._random = random.Random(rank)
        self.replies = self.wrong = 0

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        """`count` different ones."""
        for step in range(count):
            if self._apart_s:
                sleep_until(time.monotonic() + self._random.uniform(0, self._apart_s))
            yield self._ids + step

    def forward(self) -> None:
        if self._step_s:
            sleep_until(time.monotonic() + FORWARD_SHARE * self._step_s)

    def backward(self, ids: torch.Tensor | None = None, answer: torch.Tensor | None = None) -> None:
        """The rest of the step, and in the device's shadow a look at the reply, which is no part of any step."""
        deadline = time.monotonic() + (1 - FORWARD_SHARE) * self._step_s
        if ids is not None and answer is not None:
            self.replies += 1
            self.wrong += not right(ids, answer)
        if self._step_s:
            sleep_until(deadline)


Way = Callable[[Bridge, _Student, int], Iterator[None]]


def _alone(_: Bridge, student: _Student, steps: int) -> Iterator[None]:
    for _ids in student.batches(steps):
        student.forward()
        student.backward()
        yield


def _exchange(bridge: Bridge, student: _Student, steps: int) -> Iterator[None]:
    """Ask and wait, then make the step."""
    for ids in student.batches(steps):
        reply = bridge.exchange(ids)
        student.forward()
        student.backward(ids, reply["answer"])
        yield


def _submit(bridge: Bridge, student: _Student, steps: int) -> Iterator[None]:
    """Ask at the step's begin, wait where the reply is needed."""
    for ids in student.batches(steps):
        pending = bridge.submit(ids)
        student.forward()
        with pending.wait() as reply:
            student.backward(ids, reply["answer"])
        yield


def _prefetch(bridge: Bridge, student: _Student, steps: int) -> Iterator[None]:
    """Asked for one step before."""
    for ids, pending in bridge.prefetch(student.batches(steps)):
        student.forward()
        with pending.wait() as reply:
            student.backward(ids, reply["answer"])
        yield


WAYS: dict[str, Way] = {"alone": _alone, "exchange": _exchange, "submit": _submit, "prefetch": _prefetch}
