"""A data-parallel training group and its teachers, with simulated devices and the real Owner, Server and Bridge.

On a simulated device time passes and nothing is computed, so that a few cores can stand for a machine of GPUs. Work ends at
an absolute deadline, the moment it began plus the time it takes; a sleep that is cut short is continued. What a sleep
oversleeps, the wake-up of a process, is part of every step: nothing is subtracted.

A step of a rank is a third of its device's time for the forward, the reply, two thirds for loss and backward, and a barrier of
all ranks, which stands for the all-reduce of the gradients.
"""

from __future__ import annotations

import argparse
import mmap
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp
from rich.text import Text

from benchmarks import tables
from benchmarks.bridge import SETTINGS
from benchmarks.processes import Failed, Processes, precise_sleeps, sleep_until, undoing
from shmbridge import config
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.main import serve

TOKENS = 1024  # of each request
FORWARD_SHARE = 1 / 3  # of a step of the student
_WIDTH = 16  # float32 for each position of a reply: 64 KB for 1024 tokens, as much as a top-k of 8 words and IDs
_TAIL = 2  # steps behind the measured ones, so that a prefetch is ahead to the end
_FORWARDS, _DEVICE_S, _CPU_S = range(3)  # what a teacher counts


class Order(NamedTuple):
    """A turn of a group. `way` is how the loop asks: alone, exchange, submit or prefetch."""

    way: str
    warm: int
    steps: int
    student_s: float = 0.0
    forward_s: float = 0.0  # of a teacher, whatever the batch
    token_s: float = 0.0  # and for each token of it, padding too
    meets: bool = True  # at the end of each step
    apart_s: float = 0.0  # ranks ask up to that much later than they could, each step anew


class Sample(NamedTuple):
    """A turn of a group, in figures of one step."""

    step_s: float
    forwards: float  # of all teachers
    busy: float  # share of the step in which the busiest teacher's device works
    teacher_cpu: float  # cores, of all teachers together
    ranks_cpu: float  # cores, of all ranks together
    replies: int  # of the whole turn, each the right one


def median(samples: Sequence[Sample]) -> Sample:
    """Field by field; the replies are all of them."""
    *middle, _ = (statistics.median(values) for values in zip(*samples, strict=True))
    return Sample(*middle, sum(one.replies for one in samples))


def measure(
    plans: Mapping[Any, tuple[tuple[int, int, str], Order]], repeats: int, patience_s: float
) -> dict[Any, list[Sample]]:
    """Give each case turns, in rounds that begin with another case each time.

    Args:
        plans: For each case its group (ranks, teachers, a setting) and its order. All groups are alive at once.
        repeats: Turns of each case.
        patience_s: When a process that does not answer counts as hung.

    Raises:
        Failed: a process did not answer, or a reply was wrong.
    """
    samples: dict[Any, list[Sample]] = {case: [] for case in plans}
    cases = list(plans)
    with undoing() as undo:
        groups = {}
        for kind in dict.fromkeys(kind for kind, _ in plans.values()):
            groups[kind] = Group(*kind, patience_s)
            undo.callback(groups[kind].stop)
            groups[kind].start()
        for turn in range(repeats):
            first = turn * len(cases) // repeats
            for number, case in enumerate([*cases[first:], *cases[:first]], 1):
                tables.progress(f"[{turn + 1}/{repeats}, {number}/{len(cases)}] {case}")
                kind, order = plans[case]
                samples[case].append(groups[kind].turn(order))
    return samples


def figures(samples: Mapping[Any, Sequence[Sample]]) -> list[dict[str, Any]]:
    """Cases with their turns, for JSON."""
    return [{**case._asdict(), "turns": [turn._asdict() for turn in turns]} for case, turns in samples.items()]


def turns_text(options: argparse.Namespace, warm: int) -> str:
    return f"{options.repeats} x {options.steps} steps of each case, {warm} before them"


def replies_text(found: Iterable[Sample]) -> Text:
    replies = sum(each.replies for each in found)
    return Text(f"{replies} of {replies} replies are the answer to their request")


class Group:
    """Ranks and their teachers, alive until `stop`; they take turns with those of other groups."""

    def __init__(self, ranks: int, teachers: int, setting: str, patience_s: float) -> None:
        overrides = [*SETTINGS, f"ring.max_tokens={TOKENS}", "ring.max_batch=1", setting]
        self._processes = Processes(patience_s)
        self._owner = Owner(config.load(overrides=overrides), ranks, teachers)
        self._token = self._owner.start_generation()
        self._barrier = _barrier(ranks)
        # In memory that all processes share: what a forward takes, in all and for each token, and what each teacher counts.
        words = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE))
        self._forward_s, self._counts = words[:2], words[8 : 8 + 3 * teachers].reshape(teachers, 3)
        self._ranks = ranks

    def start(self) -> None:
        """Fork and connect. Raises Failed; `stop` is due in any case."""
        for index in range(len(self._counts)):
            self._processes.fork(partial(self._teach, index))
        for index in range(self._ranks):
            self._processes.fork_with_pipe(partial(self._train, index))
        self._owner.create_replies(self._processes.until(self._owner.offered))
        self._processes.collect()

    def turn(self, order: Order) -> Sample:
        """Every rank makes its steps. Raises Failed."""
        self._forward_s[:] = order.forward_s, order.token_s
        self._processes.send(order)
        turns: list[_Turn] = self._processes.collect()
        if wrong := sum(turn.wrong for turn in turns):
            raise Failed(f"{wrong} replies were not the answer to their request")
        elapsed_s, counts = statistics.mean(turn.elapsed_s for turn in turns), turns[0].counts
        return Sample(
            step_s=elapsed_s / order.steps,
            forwards=float(counts[:, _FORWARDS].sum()) / order.steps,
            busy=float(counts[:, _DEVICE_S].max()) / elapsed_s,
            teacher_cpu=float(counts[:, _CPU_S].sum()) / elapsed_s,
            ranks_cpu=sum(turn.cpu_s for turn in turns) / elapsed_s,
            replies=sum(turn.replies for turn in turns),
        )

    def stop(self) -> None:
        """End the processes and remove the session."""
        self._processes.stop()
        self._owner.close()

    # In the children

    def _teach(self, index: int) -> None:
        precise_sleeps()
        session = TeacherSession(self._token, index)
        serve(session, partial(self._forward, self._counts[index]), torch.device("cpu"))

    def _forward(self, counts: np.ndarray, batch: Batch) -> dict[str, torch.Tensor]:
        """The answer to a position is its token ID, _WIDTH times."""
        began = time.monotonic()
        deadline = began + self._forward_s[0] + self._forward_s[1] * batch.input_ids.numel()
        answer = batch.input_ids.float().unsqueeze(-1).expand(*batch.input_ids.shape, _WIDTH)
        sleep_until(deadline)
        counts[_FORWARDS] += 1
        counts[_DEVICE_S] += time.monotonic() - began
        counts[_CPU_S] = time.process_time()
        return {"answer": answer}

    def _train(self, index: int, pipe: Connection) -> None:
        precise_sleeps()
        with Bridge(RankSession(self._token, index)) as bridge:
            bridge.wait_ready()
            pipe.send(None)
            while (order := pipe.recv()) is not None:
                pipe.send(self._steps(index, bridge, order))

    def _steps(self, index: int, bridge: Bridge, order: Order) -> _Turn:
        """The replies of all steps are looked at, in the shadow of the device's backward."""
        last, marks = order.warm + order.steps, []
        replies = wrong = 0
        self._barrier(index)
        asked = _asked(bridge, order.way, _batches(index, last + _TAIL, order.apart_s))
        for step, (ids, answer) in enumerate(asked, 1):
            sleep_until(time.monotonic() + FORWARD_SHARE * order.student_s)
            with answer() as reply:
                backward = time.monotonic() + (1 - FORWARD_SHARE) * order.student_s
                if reply is not None:
                    replies += 1
                    wrong += not (reply["answer"] == ids.unsqueeze(-1)).all()
                sleep_until(backward)
            if order.meets:
                self._barrier(index)
            if step in (order.warm, last):
                marks.append((time.monotonic(), time.process_time(), self._counts.copy()))
        (began, cpu, before), (ended, cpu_at_end, after) = marks
        return _Turn(ended - began, cpu_at_end - cpu, after - before, replies, wrong)


class _Turn(NamedTuple):
    """What a rank saw of the measured steps; replies are of all steps."""

    elapsed_s: float
    cpu_s: float
    counts: np.ndarray  # of each teacher
    replies: int
    wrong: int


def _barrier(ranks: int) -> Callable[[int], None]:
    """Few semaphores, which are part of each step: all report to rank 0, which lets them go. It is called with the rank."""
    fork = mp.get_context("fork")
    arrived, go = fork.Semaphore(0), [fork.Semaphore(0) for _ in range(1, ranks)]

    def wait(rank: int) -> None:
        if rank:
            arrived.release()
            go[rank - 1].acquire()
            return
        for _ in go:
            arrived.acquire()
        for each in go:
            each.release()

    return wait


def _batches(rank: int, count: int, apart_s: float) -> Iterator[torch.Tensor]:
    """`count` different ones, each up to `apart_s` late."""
    late = random.Random(rank)
    for step in range(count):
        if apart_s:
            sleep_until(time.monotonic() + late.uniform(0, apart_s))
        yield torch.arange(TOKENS).reshape(1, TOKENS) + 1_000_000 * rank + step


def _asked(
    bridge: Bridge, way: str, batches: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, Callable[[], AbstractContextManager[Any]]]]:
    """Batches, each with what waits for its reply, which is called where the step needs it."""
    if way == "prefetch":  # asked for one step before
        return ((ids, pending.wait) for ids, pending in bridge.prefetch(batches))
    if way == "submit":  # at the step's begin
        return ((ids, bridge.submit(ids).wait) for ids in batches)
    if way == "exchange":  # and waited for before the step
        return ((ids, partial(nullcontext, bridge.exchange(ids))) for ids in batches)
    return ((ids, nullcontext) for ids in batches)
