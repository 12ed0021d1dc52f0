"""A rank whose GPU waits for a teacher that is gone."""

from __future__ import annotations

import os
import signal

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
            look = Stuck(bridge._open, bridge.gpu_waits_for).look
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
            for teacher in (session.teacher.identity, None):
                Stuck(session, lambda teacher=teacher: teacher).look()


def test_who_is_watched_is_the_teacher_that_the_gpu_waits_for(monkeypatch):
    """Another one may serve the lane by now."""
    monkeypatch.setattr(stuck, "PATIENCE_S", 0.0)
    left: list[int] = []
    monkeypatch.setattr(stuck.os, "_exit", left.append)
    with bench() as it:
        it.teacher(Echo())
        with it.bridge() as bridge:
            bridge.wait_ready()
            session: TrainerSession = bridge._open
            living, dead = session.teacher.identity, Identity(2**22 + 1, 1)
            waits_for = [dead, living, None, dead]
            watch = Stuck(session, lambda: waits_for[0])
            watch.look()
            assert left == [stuck.EXIT_CODE]
            for _ in range(2):
                waits_for.pop(0)
                watch.look()
            assert left == [stuck.EXIT_CODE]
