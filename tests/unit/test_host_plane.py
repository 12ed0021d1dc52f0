"""The host plane beside a GPU, whose streams and events are recorders here: what is published, and given back, after what.

Copies are made at once; that they have come to an end is said only when the test opens a gate.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from shmbridge.plane import cuda_runtime
from shmbridge.plane.base import LaneSpec
from shmbridge.plane.host import RankHostPlane, TeacherHostPlane
from shmbridge.rank.bridge import Pending
from shmbridge.shm.ring import Ring
from tests.harness import PATIENCE_S, until
from tests.pair import RAISES
from tests.pair import Pair as PlainPair

GPU = torch.device("cuda", 0)
STREAM = "payload.stream={chunk_positions: 3, chunks: 2}"


class Stream(SimpleNamespace):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Recorder:
    """Stands for torch.cuda: `calls` in order, from all threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.gates: dict[str, threading.Event] = {}  # by the event's name; a test opens them
        self.error: Exception | None = None  # raised behind a gate
        self.events = self.streams = 0
        self.current = SimpleNamespace(name="compute", wait_event=self._waits("compute"))
        self.registered: list[int] = []
        self.refuses = 0  # what cudaHostRegister returns
        self.side = "teacher"
        for name, stand_in in (
            ("Stream", self.stream),
            ("Event", self.event),
            ("stream", self.on),
            ("current_stream", lambda device=None: self.current),
            ("cudart", lambda: self),
            ("device", nullcontext),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        to, calls = torch.Tensor.to, self.calls
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: calls.append(f"keeps for {stream.name}")
        )
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self.clone() if GPU in a else to(self, *a, **k))
        for name in ("publish_reply", "publish_chunk", "release", "consume"):
            real = getattr(Ring, name)

            def told(ring, *args, name=name, real=real):
                calls.append(name)
                return real(ring, *args)

            monkeypatch.setattr(Ring, name, told)

    def _waits(self, stream: str):
        return lambda event: self.calls.append(f"{stream} waits {event.name}")

    def stream(self, device: torch.device) -> SimpleNamespace:
        name = f"{self.side}'s copies"
        follow = lambda other: self.calls.append(f"{name} follow {other.name}")  # noqa: E731
        return Stream(name=name, wait_stream=follow, query=lambda: True)

    def event(self, blocking: bool) -> SimpleNamespace:
        assert blocking, "a thread that waits for it would spin"
        name = f"{self.side}{self.events}"
        self.events += 1
        return SimpleNamespace(
            name=name,
            record=lambda stream: self.calls.append(f"{stream.name} record {name}"),
            synchronize=lambda: self.arrive(name),
        )

    def arrive(self, name: str) -> None:
        self.calls.append(f"host waits {name}")
        if name in self.gates:
            assert self.gates[name].wait(PATIENCE_S)
            if self.error:
                raise self.error
        self.calls.append(f"{name} has come")

    @contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if not self.refuses:
            self.registered.append(address)
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.registered.remove(address)
        return 0


class Pair(PlainPair):
    """With planes as on a GPU."""

    def __init__(self, cuda: Recorder, *overrides: str) -> None:
        super().__init__("plane=host", *overrides)
        self.open_teacher()
        spec = LaneSpec(self.token, self.session.control.shape, self.session.served[0], self.agreed, GPU)
        self.server._replies._planes[0] = TeacherHostPlane(spec)
        cuda.side = "rank"
        self.open_rank()
        self.bridge._requests.replies.plane = RankHostPlane(spec)
        cuda.calls.clear()

    def forward(self, batch) -> dict[str, torch.Tensor]:
        if (batch.input_ids == RAISES).any():
            raise ArithmeticError("sixty-six")
        return {"rows": batch.input_ids.float()}


@pytest.fixture
def cuda(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


@contextmanager
def met(cuda: Recorder, *overrides: str) -> Iterator[Pair]:
    pair = Pair(cuda, *overrides)
    try:
        yield pair
    finally:
        for gate in cuda.gates.values():
            gate.set()
        pair.close()


def row(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


def test_a_reply_is_published_once_its_copy_has_come(cuda):
    cuda.gates["teacher0"] = threading.Event()
    with met(cuda) as pair:
        pending = pair.bridge.submit(row(1, 2, 3))
        pair.teach()
        until(lambda: "host waits teacher0" in cuda.calls, "the publisher")
        assert cuda.calls == [
            "teacher's copies follow compute",
            "keeps for teacher's copies",
            "teacher's copies record teacher0",
            "host waits teacher0",
        ]
        assert not pending.done
        cuda.gates["teacher0"].set()
        until(lambda: pending.done, "the reply")
        assert cuda.calls[4:6] == ["teacher0 has come", "publish_reply"]


def test_the_forwards_thread_goes_on_while_a_copy_is_on_its_way(cuda):
    """A reply, a skip, an error, a reply: published in their order."""
    cuda.gates["teacher0"] = threading.Event()
    with met(cuda, "ring.depth=4") as pair:
        waiting = [pair.bridge.submit(row(1))]
        pair.teach()
        waiting += [pair.bridge.submit(ids) for ids in (row(2), row(RAISES), row(3))]
        for pending in waiting[:2]:
            pending.cancel()
        pair.teach()
        assert pair.server._forwards == 2, "the one that nobody wants is not computed"
        assert not any(pending.done for pending in waiting[2:])
        assert "publish_reply" not in cuda.calls
        cuda.gates["teacher0"].set()
        until(lambda: waiting[3].done, "the last reply")
        published = [call for call in cuda.calls if call in ("publish_reply", "teacher0 has come", "teacher3 has come")]
        assert published == [*("teacher0 has come",), *["publish_reply"] * 3, "teacher3 has come", "publish_reply"]


def test_a_slot_is_given_back_once_the_ranks_own_copy_has_come(cuda):
    with met(cuda, "ring.depth=1") as pair:
        pending = pair.bridge.submit(row(1, 2, 3))
        pair.teach()
        lease = pending.wait()
        assert torch.equal(lease.reply["rows"], row(1, 2, 3).float())
        copied = cuda.calls[cuda.calls.index("publish_reply") + 1 :]
        assert copied == ["rank's copies record rank1", "compute waits rank1", "keeps for compute"]
        lease.release()
        assert cuda.calls[-3:] == ["host waits rank1", "rank1 has come", "release"]


def test_the_memory_of_a_copy_is_the_ranks_own(cuda):
    """A lease covers the slot, not the copy: it may be kept, without a word."""
    with met(cuda, "ring.depth=1") as pair:
        kept = []
        for turn in range(3):
            pending = pair.bridge.submit(row(turn, turn))
            pair.teach()
            with pending.wait() as reply:
                kept.append(reply["rows"])
        assert [float(rows[0, 0]) for rows in kept] == [0.0, 1.0, 2.0]


def read(pair: Pair, pending: Pending) -> torch.Tensor:
    parts = []
    for _, chunk in pending.chunks():
        parts.append(chunk["rows"].clone())
        pair.teach()
    return torch.cat(parts)


def test_so_is_it_with_chunks(cuda):
    with met(cuda, STREAM) as pair:
        sent = torch.arange(14).view(2, 7)
        pending = pair.bridge.submit(sent)
        pair.teach()
        assert torch.equal(read(pair, pending), sent.flatten().float())
        kept = [call for call in cuda.calls if call in ("publish_chunk", "consume") or call.endswith("has come")]
        of_teacher = [call for call in kept if call == "publish_chunk" or call.startswith("teacher")]
        of_rank = [call for call in kept if call == "consume" or call.startswith("rank")]
        slots = [0, 1, 0, 1, 0]
        assert of_teacher == [call for slot in slots for call in (f"teacher{slot} has come", "publish_chunk")]
        assert of_rank == [call for slot in slots for call in (f"rank{2 + slot} has come", "consume")]


def test_a_cuda_error_while_waiting_ends_the_teacher(cuda):
    cuda.gates["teacher0"] = threading.Event()
    cuda.error = RuntimeError("CUDA error: unspecified launch failure")
    with met(cuda) as pair:
        pending = pair.bridge.submit(row(1))
        pair.teach()
        pair.server._collector._check()
        cuda.gates["teacher0"].set()
        until(lambda: pair.server._replies.publisher._error, "the failure")
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            pair.server._collector._check()
        assert not pending.done


# Pinned memory


def test_memory_that_cuda_does_not_pin_is_used_all_the_same(cuda, caplog, monkeypatch):
    launched = []

    def launch(count, device):
        launched.append(device)
        raise RuntimeError("CUDA error: the one that the last call left behind")

    monkeypatch.setattr(cuda_runtime, "torch", SimpleNamespace(zeros=launch, cuda=torch.cuda))
    cuda.refuses = 801
    caplog.set_level(logging.WARNING, "shmbridge")
    keeper = set()
    assert not cuda_runtime.register(memoryview(bytearray(4096)), keeper, GPU)
    assert launched == [GPU], "what the failed call left is taken by a launch of our own"
    assert "did not pin 4096 bytes" in caplog.text
    assert "801" in caplog.text
    del keeper
    assert cuda.registered == []


def test_each_side_pins_its_own_mapping(cuda):
    with met(cuda) as pair:
        assert len(cuda.registered) == 2
        assert isinstance(pair.bridge._requests.replies.plane, RankHostPlane)
    del pair
    gc.collect()
    assert cuda.registered == []
