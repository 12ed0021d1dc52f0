"""A rank whose GPU waits for a teacher that is gone."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import torch

from shmbridge import cuda_plane, stuck
from shmbridge.peer import Identity
from shmbridge.session import TrainerSession
from shmbridge.stuck import Stuck
from tests.fake_cuda import FakeCuda
from tests.harness import Echo, bench, until

IDS = torch.arange(8).reshape(2, 4)


def test_a_rank_leaves_when_its_gpu_waits_for_a_dead_teacher(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda_plane, "cuda_ipc", fake)
    monkeypatch.setattr(stuck, "PATIENCE_S", 0.0)
    with bench(1, "plane=cuda_ipc") as it:
        teacher = it.teacher(Echo())

        def train(bridge):
            look = Stuck(bridge._open, bridge.gpu_stands_at).look
            bridge.exchange(IDS)
            look()  # the reply has been read
            fake.hold_queries = True
            bridge.exchange(IDS)
            look()  # the GPU waits, and the teacher is there
            os.kill(teacher.pid, signal.SIGKILL)
            until(lambda: look() or False)

        rank = it.rank(0, train)
        assert rank.join() == stuck.EXIT_CODE
        failure = it.owner.lanes[0].records[0].failure
        assert failure.consequence and "has waited" in failure.reason


def test_a_gpu_that_waits_for_a_living_teacher_is_left_alone(monkeypatch):
    monkeypatch.setattr(stuck, "PATIENCE_S", 0.0)
    with bench() as it:
        it.teacher(Echo())
        with it.bridge() as bridge:
            bridge.wait_ready()
            session: TrainerSession = bridge._open
            Stuck(session, lambda: (session.teacher.identity, 0)).look()
            Stuck(session, lambda: None).look()


def test_only_one_read_that_stands_still_ends_the_rank(monkeypatch):
    """Not reads that follow one another, nor reads of several teachers, though one is pending at each look."""
    left: list[int] = []
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(stuck, "time", clock)
    monkeypatch.setattr(stuck.os, "_exit", left.append)
    with bench() as it:
        session = TrainerSession(it.token, 0)
        dead, other = Identity(2**22 + 1, 1), Identity(2**22 + 2, 1)
        reads = [(dead, number) for number in range(9)] + [(other, 9), (dead, 9), None, (dead, 9)]
        watch = Stuck(session, lambda: read)
        for step, read in enumerate(reads):  # noqa: B007
            now = 10.0 * stuck.PATIENCE_S * step
            watch.look()
        assert not left
        now += stuck.PATIENCE_S
        watch.look()
        assert left == [stuck.EXIT_CODE]
