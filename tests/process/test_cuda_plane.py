"""The CUDA plane between real processes over a stand-in for the GPU: kills at chosen points, what grows, who is served on."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time

import pytest
import torch

from shmbridge.errors import TeacherDied, TornReply
from shmbridge.plane.cuda import TeacherCudaPlane
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.ring import Ring
from shmbridge.teacher.batch import Batch
from tests.fake_cuda import FakeCuda
from tests.harness import bench

COPY, IN_PLACE = "cuda.read=copy", "cuda.read=in_place"
STREAM = "payload.stream={chunk_positions: 2, chunks: 2}"
WAYS = pytest.mark.parametrize(
    "overrides",
    [(COPY,), (IN_PLACE,), (COPY, STREAM), (IN_PLACE, STREAM)],
    ids=["copy", "in place", "chunks", "chunks in place"],
)
LETHAL = 666
IDS = torch.arange(1, 7).view(1, 6)


@pytest.fixture(autouse=True)
def fake(monkeypatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


def floats(batch: Batch) -> dict[str, torch.Tensor]:
    return {"rows": batch.input_ids.float()}


def cuda_bench(lanes: int, *overrides: str):
    return bench(lanes, "plane=cuda_ipc", *overrides)


def answers(bridge: Bridge, ids: torch.Tensor = IDS) -> bool:
    return torch.equal(bridge.exchange(ids)["rows"], ids.float())


# The teacher is killed


DIED = mmap.mmap(-1, 8)  # when; shared with the processes that the test forks


def die(*_: object) -> None:
    DIED[:] = struct.pack("d", time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)


class Point:
    """Kills the teacher in the reply (or chunk) of a number, at a point of its way out."""

    def __init__(self, kind: type, name: str, number: int, before: bool) -> None:
        self.kind, self.name, self.number, self.before = kind, name, number, before

    def arm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(self.kind, self.name), []
        test = os.getpid()

        def kill(this, *args):
            calls.append(args)
            mine = os.getpid() != test and len(calls) == self.number + 1
            if mine and self.before:
                die()
            done = real(this, *args)
            if mine:
                die()
            return done

        monkeypatch.setattr(self.kind, self.name, kill)


def points(number: int, streams: bool) -> dict[str, Point]:
    publish = "publish_chunk" if streams else "publish_reply"
    return {
        "before the write": Point(TeacherCudaPlane, "write", number, True),
        "before the stamp": Point(TeacherCudaPlane, "seal", number, True),
        "between stamp and publish": Point(TeacherCudaPlane, "seal", number, False),
        "before publish": Point(Ring, publish, number, True),
        "after publish": Point(Ring, publish, number, False),
    }


@WAYS
@pytest.mark.promise(8, within="1 s")
@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.matrix), 3])
@pytest.mark.parametrize("point", points(0, False))
def test_a_rank_never_gets_a_wrong_number_from_a_teacher_that_is_killed(overrides, number, point, monkeypatch, promise):
    points(number, STREAM in overrides)[point].arm(monkeypatch)
    with cuda_bench(1, *overrides, "ring.depth=2") as it:
        teacher, bridge, right = it.teacher(floats), it.bridge(), 0
        with pytest.raises((TeacherDied, TornReply)):
            for turn in range(10):
                sent = IDS + turn
                found = bridge.exchange(sent)["rows"]
                assert torch.equal(found, sent.float()) or found.isnan().any(-1).all()
                right += 1
        took_s = time.monotonic() - struct.unpack("d", DIED)[0]
        chunks = 3 if STREAM in overrides else 1
        assert right == (number + (point == "after publish")) // chunks
        assert teacher.join() == -signal.SIGKILL
    promise.kept("killed before, in or after a copy (stand-in for the GPU): no wrong number, then TeacherDied", took_s)


def triples(batch: Batch) -> dict[str, torch.Tensor]:
    return {"rows": batch.input_ids.float().unsqueeze(-1).repeat(1, 1, 3)}


@WAYS
def test_events_that_come_without_the_stamp_give_nan_and_then_an_error(overrides, monkeypatch, fake):
    """What a kill in the middle of a copy may leave: the reply is published, its event comes, its bytes do not."""
    real, calls = TeacherCudaPlane.seal, []

    def seal(self, number):
        calls.append(number)
        if len(calls) <= 6:
            return real(self, number)
        slot = number % self._slab.slots
        # Something that looks like numbers, in this slot alone: the rank may be reading its neighbour.
        self._slab.memory[slot * self._slab.stride : (slot + 1) * self._slab.stride].fill_(0x3F)
        self._slab.ready[slot].record(self._stream)
        return None

    monkeypatch.setattr(TeacherCudaPlane, "seal", seal)
    replies = 2 if STREAM in overrides else 6

    def body(bridge: Bridge) -> None:
        for turn in range(replies):
            assert torch.equal(bridge.exchange(IDS + turn)["rows"][..., 2], (IDS + turn).float())
        fake.stands_still = True  # the rank's host does not know yet
        assert bridge.exchange(IDS)["rows"].isnan().any(-1).all()
        fake.go_on()
        with pytest.raises(TornReply, match="last checkpoint"):
            bridge.exchange(IDS)
        bridge._requests.replies.plane._reads._pending.clear()  # each torn chunk is told once, the last of them at the close

    with cuda_bench(1, *overrides) as it:
        it.teacher(triples)
        assert it.rank(0, body).join() == 0


def test_a_teacher_that_is_killed_in_a_forward_is_named_with_step_and_sequence():
    def lethal(batch: Batch) -> dict[str, torch.Tensor]:
        if (batch.input_ids == LETHAL).any():
            die()
        return floats(batch)

    def body(bridge: Bridge) -> None:
        assert answers(bridge)
        with pytest.raises(TeacherDied, match="step 7, sequence 1"):
            bridge.exchange(torch.full((1, 2), LETHAL), step=7)

    with cuda_bench(2, COPY) as it:
        it.teacher(lethal)
        assert [child.join() for child in (it.rank(0, body), it.rank(1, body))].count(0) >= 1


# A rank is killed


@WAYS
def test_a_rank_that_is_killed_with_a_reply_in_its_hands_holds_up_nobody(overrides):
    held, let = os.pipe(), os.pipe()

    def holds(bridge: Bridge) -> None:
        pending = bridge.submit(IDS)
        if STREAM in overrides:
            chunks = pending.chunks()
            next(chunks)
        else:
            pending.wait()
        os.write(held[1], b".")
        os.read(let[0], 1)

    with cuda_bench(2, *overrides, "ring.depth=1") as it:
        teacher = it.teacher(floats)
        holder = it.rank(0, holds)
        other = it.bridge(1)
        os.read(held[0], 1)
        assert answers(other)
        holder.kill()
        assert holder.join() == -signal.SIGKILL
        for turn in range(20):
            assert answers(other, IDS + turn)
        other.close()
        assert teacher.join() == 0


# What grows


class Watched:
    """A teacher that answers IDs with what its own process holds, to be told by each reply."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        held = torch.tensor([self.cuda.exports, self.cuda.made, *belongings()])
        self.cuda.calls.clear()
        return {"rows": batch.input_ids.float(), "held": held.repeat(len(batch.input_ids), 1)}


def belongings() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize(
    ("read", "requests"), [pytest.param(COPY, 10_000, marks=pytest.mark.slow), (COPY, 500), (IN_PLACE, 500)]
)
def test_exports_events_files_and_threads_stay_as_they_are(read, requests, fake):
    warm, go = os.pipe(), os.pipe()

    def body(bridge: Bridge) -> None:
        for _ in range(20):
            bridge.exchange(IDS)
        os.write(
            warm[1], b"."
        )  # the teacher has opened the events of this lane; of the other one too once it may go on
        os.read(go[0], 1)
        held = []
        for _ in range(requests):
            reply = bridge.exchange(IDS)
            fake.calls.clear()
            held = [*held[:1], (*reply["held"][0].tolist(), fake.exports, fake.made, *belongings())]
        early, late = held
        assert early[0] == 2, "one memory for each lane"
        # A process opens its peers' pidfds when it first looks after them; what leaked would come with every request.
        assert all(now <= then + 8 for now, then in zip(late, early, strict=True)), (early, late)
        assert late[0] == early[0]

    with cuda_bench(2, read) as it:
        it.teacher(Watched(fake))
        ranks = [it.rank(lane, body) for lane in range(2)]
        for _ in ranks:
            os.read(warm[0], 1)
        os.write(go[1], b"..")
        assert [rank.join() for rank in ranks] == [0, 0]


# Threads of the test's own


def test_a_reply_that_is_read_by_another_thread_is_right():
    """A loader's thread may hold the lease; streams are the GPU's, cursors the lane's."""
    found: list[bool] = []
    with cuda_bench(1, IN_PLACE) as it:
        it.teacher(floats)
        bridge = it.bridge()
        pending = bridge.submit(IDS)

        def read() -> None:
            with pending.wait() as reply:
                found.append(torch.equal(reply["rows"], IDS.float()))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        assert found == [True]
        assert answers(bridge)
        bridge.close()
