"""A rank whose GPU waits for a teacher that is gone."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from shmbridge.errors import TeacherDied
from shmbridge.rank import device
from shmbridge.rank.device import Watchdog
from shmbridge.shm import heartbeat
from shmbridge.shm.heartbeat import Heartbeat
from shmbridge.shm.process import Identity
from shmbridge.shm.rank_session import RankSession
from tests.fake_cuda import FakeCuda, FakeEvent, FakeStream
from tests.harness import Echo, bench, until

IDS = torch.arange(8).reshape(2, 4)


def test_a_rank_leaves_when_its_gpu_waits_for_a_dead_teacher(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(device, "PATIENCE_S", 0.0)
    with bench(1, "plane=cuda_ipc") as it:
        teacher = it.teacher(Echo())

        def train(bridge):
            look = bridge._requests.watchdog.look
            bridge.exchange(IDS)
            look()  # the reply has been read
            fake.stands_still = True
            bridge.exchange(IDS)
            look()  # the GPU waits, and the teacher is there
            os.kill(teacher.pid, signal.SIGKILL)
            until(lambda: look() or False)

        rank = it.rank(0, train)
        assert rank.join() == device.EXIT_CODE
        failure = it.owner.lanes[0].records[0].failure
        assert failure.consequence and "has waited" in failure.reason


@pytest.mark.parametrize("read", ["copy", "in_place"])
def test_the_watchdogs_thread_makes_no_call_of_cuda(read, monkeypatch):
    """A call would make a context on GPU 0, and may hang where the watchdog is needed."""
    fake, threads = FakeCuda(), []

    def noted(real):
        def call(*args, **kwargs):
            threads.append(threading.current_thread())
            return real(*args, **kwargs)

        return call

    for kind in (FakeCuda, FakeEvent, FakeStream):
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                monkeypatch.setattr(kind, name, noted(method))
    fake.install(monkeypatch)
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.001)
    with bench(1, "plane=cuda_ipc", f"cuda.read={read}", "timeouts.shutdown_s=0.1") as it:
        it.teacher(Echo())
        with it.bridge() as bridge:
            bridge.exchange(IDS)
            looks, fake.stands_still = [], True
            pending = bridge.submit(IDS)
            with pending.wait():
                plane = bridge._requests.replies.plane

                def look() -> None:
                    looks.append(plane.waits_for())
                    bridge._requests.watchdog.look()

                beats = Heartbeat(bridge._life.session.record, look)
                until(lambda: len(looks) > 3)
            fake.go_on()
            until(lambda: looks[-1] is None)
            beats.stop()
    assert any(looks), "the thread saw a read that stands still"
    assert set(threads) == {threading.main_thread()}


SAID = "CUDA error: an illegal memory access was encountered"


@pytest.mark.promise(8)
@pytest.mark.parametrize("surfaces", ["in the bridge", "in the loop"])
def test_a_cuda_error_after_the_teachers_death_is_the_teachers_and_ends_the_process(surfaces, monkeypatch, promise):
    fake = FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(device, "PATIENCE_S", 0.0)
    with bench(1, "plane=cuda_ipc") as it:
        teacher = it.teacher(Echo())

        def train(bridge):
            bridge.exchange(IDS)
            pending = bridge.submit(IDS)
            until(lambda: pending.done)
            if surfaces == "in the bridge":
                monkeypatch.setattr(FakeStream, "wait_event", raises)
            with pytest.raises(TeacherDied, match=f"reply .*{SAID}.* memory it was reading is gone"), bridge:
                os.kill(teacher.pid, signal.SIGKILL)
                with pending.wait():
                    raises()
            look = bridge._requests.watchdog.look
            until(lambda: look() or False)

        rank = it.rank(0, train)
        assert rank.join() == device.EXIT_CODE
        failure = it.owner.lanes[0].records[0].failure
        assert failure.consequence and SAID in failure.reason
    promise.kept("an error of CUDA after the kill: TeacherDied")


def raises(*_: object) -> None:
    raise RuntimeError(SAID)


def test_a_cuda_error_while_the_teacher_lives_is_the_loops_own(monkeypatch):
    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(device, "DEATH_S", 0.01)
    with bench(1, "plane=cuda_ipc") as it:
        it.teacher(Echo())
        with pytest.raises(RuntimeError, match=f"^{SAID}$"), it.bridge() as bridge:
            bridge.exchange(IDS)
            raises()


def test_a_gpu_that_waits_for_a_living_teacher_is_left_alone(monkeypatch):
    monkeypatch.setattr(device, "PATIENCE_S", 0.0)
    with bench() as it:
        it.teacher(Echo())
        with it.bridge() as bridge:
            bridge.wait_ready()
            session: RankSession = bridge._life.session
            for read in ((session.teacher.identity, 0), None):
                session.plane = SimpleNamespace(stands_at=lambda read=read: read)
                Watchdog(session).look()


def test_only_one_read_that_stands_still_ends_the_rank(monkeypatch):
    """Not reads that follow one another, nor reads of several teachers, though one is pending at each look."""
    left: list[int] = []
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(device, "time", clock)
    monkeypatch.setattr(device.os, "_exit", left.append)
    with bench() as it:
        session = RankSession(it.token, 0)
        dead, other = Identity(2**22 + 1, 1), Identity(2**22 + 2, 1)
        reads = [(dead, number) for number in range(9)] + [(other, 9), (dead, 9), None, (dead, 9)]
        session.plane = SimpleNamespace(stands_at=lambda: read)
        watch = Watchdog(session)
        for step, read in enumerate(reads):  # noqa: B007
            now = 10.0 * device.PATIENCE_S * step
            watch.look()
        assert not left
        now += device.PATIENCE_S
        watch.look()
        assert left == [device.EXIT_CODE]
