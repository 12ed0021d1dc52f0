"""The CUDA plane's protocol over a simulated GPU that lags behind its hosts: order, slots, stamps, exchange of handles.

Teacher and rank are both in this process and take turns; what the GPU does in between is the simulation's.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shmbridge.errors import AttachError, PlanError, TeacherError, TornReply
from shmbridge.plane import cuda_ipc, cuda_slab, tensors
from shmbridge.plane.base import LaneSpec
from shmbridge.plane.cuda import RankCudaPlane, TeacherCudaPlane
from shmbridge.rank.bridge import Pending
from shmbridge.shm import layout
from shmbridge.shm.ring import Ring
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Names
from shmbridge.teacher.batch import Batch
from tests.fake_cuda import FakeCuda
from tests.pair import CPU, RAISES
from tests.pair import Pair as PlainPair
from tests.sim_cuda import SimEvent, SimGpu, SimStream

TABLE = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
STREAM = "payload.stream={chunk_positions: 3, chunks: 2}"
COPY, IN_PLACE = "cuda.read=copy", "cuda.read=in_place"
WAYS = pytest.mark.parametrize(
    "overrides", [(COPY,), (IN_PLACE,), (COPY, STREAM), (IN_PLACE, STREAM)], ids=lambda way: "-".join(way)[10:40]
)
READS = pytest.mark.parametrize("read", [COPY, IN_PLACE])


class Pair(PlainPair):
    """Each process launches what it launches on the simulated GPU."""

    def __init__(self, gpu: SimGpu, *overrides: str, lanes: int = 1) -> None:
        super().__init__("plane=cuda_ipc", *overrides, lanes=lanes)
        self.gpu = gpu

    def meet(self) -> Pair:
        """Up to and past the barrier."""
        self.open_teacher()
        self.open_rank()
        self.gpu.calls.clear()
        self.gpu.syncs = 0
        return self

    def open_teacher(self) -> None:
        with self.gpu.process("teacher"):
            super().open_teacher()

    def open_rank(self) -> None:
        with self.gpu.process("rank"):
            super().open_rank()

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        if (batch.input_ids == RAISES).any():
            raise ArithmeticError("sixty-six")
        return {"rows": self.gpu.put(TABLE[batch.input_ids])}

    def teach(self) -> None:
        with self.gpu.process("teacher"):
            super().teach()

    def answer(self, ids: torch.Tensor) -> torch.Tensor:
        """The reply to a request that the teacher has answered."""
        pending = self.submit(ids)
        self.teach()
        return self.read(pending)

    def submit(self, ids: torch.Tensor) -> Pending:
        with self.gpu.process("rank"):
            return self.bridge.submit(ids)

    def read(self, pending: Pending) -> torch.Tensor:
        """The reply as a kernel of the rank's sees it, once the GPU has come so far. The teacher has a turn after each chunk."""
        with self.gpu.process("rank"):
            if not self.settings.payload.stream:
                with pending.wait() as reply:
                    return reply["rows"].clone().flatten(0, 1)
            parts = []
            for _, chunk in pending.chunks():
                parts.append(chunk["rows"].clone())
                chunk = None
                self.teach()
            return torch.cat(parts)

    def plane(self, who: str) -> TeacherCudaPlane | RankCudaPlane:
        return self.server._replies._planes[0] if who == "teacher" else self.bridge._requests.replies.plane

    def lane_spec(self, lane: int = 0) -> LaneSpec:
        return LaneSpec(self.token, self.session.control.shape, self.session.served[lane], self.agreed, CPU)

    def stream(self, name: str) -> SimStream:
        return next(stream for stream in self.gpu.streams if stream.name == name)

    def close(self) -> None:
        self.gpu.run()
        super().close()


@contextmanager
def opened(gpu: SimGpu, monkeypatch: pytest.MonkeyPatch, *overrides: str, lanes: int = 1) -> Iterator[Pair]:
    gpu.install(monkeypatch)
    pair = Pair(gpu, *overrides, lanes=lanes)
    try:
        yield pair
    finally:
        pair.close()


@contextmanager
def met(gpu: SimGpu, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Iterator[Pair]:
    with opened(gpu, monkeypatch, *overrides) as pair:
        yield pair.meet()


def ids(seed: int, batch: int = 2, seq: int = 4) -> torch.Tensor:
    return torch.randint(0, 60, (batch, seq), generator=torch.Generator().manual_seed(seed))


def right(found: torch.Tensor, sent: torch.Tensor) -> bool:
    return torch.equal(found, TABLE[sent].flatten(0, 1))


@pytest.fixture
def cursors(monkeypatch):
    """Of a SimGpu given to it: what is published goes into its calls."""

    def listen(gpu: SimGpu) -> None:
        for name in ("publish_reply", "publish_chunk", "release", "consume"):
            real = getattr(Ring, name)

            def told(self, *args, name=name, real=real):
                gpu.calls.append(name)
                return real(self, *args)

            monkeypatch.setattr(Ring, name, told)

    return listen


# Order


TEACHER_WRITES = ("lane copy_", "lane fill_", "lane records ready{slot}", "{published}")
RANK_COPIES = (
    *("side waits ready{slot}", "side clone", "side masked_fill_", "side copy_", "side records free{slot}"),
    *("rank's compute waits free{slot}", "{given_back}", "rank's compute clone"),
)
RANK_READS = (
    *(
        "rank's compute copy_",
        "rank's compute waits ready{slot}",
        "rank's compute masked_fill_",
        "rank's compute copy_",
    ),
    *("rank's compute clone", "rank's compute records free{slot}", "{given_back}"),
)
CLOCKS = ("follows", "records own", " ne", "teacher's compute", " empty")


def of_protocol(calls: list[str], streams: bool) -> list[str]:
    """Without clocks and preparations; of streamed replies the chunks."""
    around = ("publish_reply", "release") if streams else ()
    return [call for call in calls if not any(part in call for part in CLOCKS) and call not in around]


@WAYS
def test_events_are_recorded_before_a_cursor_says_so_and_waited_for_after(overrides, monkeypatch, cursors):
    gpu = SimGpu()
    cursors(gpu)
    streams = STREAM in overrides
    published, given_back = ("publish_chunk", "consume") if streams else ("publish_reply", "release")
    reads = RANK_READS if IN_PLACE in overrides else RANK_COPIES
    with met(gpu, monkeypatch, *overrides, "ring.depth=2") as pair:
        for turn in range(4):
            gpu.calls.clear()
            pair.answer(ids(turn, 1, 3))
            slot = turn % 2
            again = (f"lane waits free{slot}",) if turn >= 2 else ()
            expected = [
                line.format(slot=slot, published=published, given_back=given_back)
                for line in (*again, *TEACHER_WRITES, *reads)
            ]
            assert [call for call in of_protocol(gpu.calls, streams) if "cat" not in call] == expected
            assert gpu.syncs == 0


@WAYS
@pytest.mark.parametrize("seed", range(6))
def test_every_interleaving_of_two_gpus_reads_what_was_written(overrides, seed, monkeypatch):
    gpu, choose = SimGpu(seed), random.Random(seed)
    with met(gpu, monkeypatch, *overrides, "ring.depth=3") as pair:
        waiting, found = [], []
        for turn in range(20):
            sent = ids(turn, 1 + turn % 3, 2 + turn % 5)
            waiting.append((sent, pair.submit(sent)))
            pair.teach()
            gpu.run(choose.randrange(30))
            while waiting and (len(waiting) == 3 or choose.random() < 0.5):
                asked, pending = waiting.pop(0)
                found.append((asked, pair.read(pending)))
                gpu.run(choose.randrange(10))
        assert gpu.syncs == 0, "nobody's host waits for a GPU"
        gpu.run()
        assert len(found) > 10
        assert all(right(rows, asked) for asked, rows in found)
        pair.plane("rank").check()


MUTANTS = {
    "the rank does not wait for ready": lambda monkeypatch: _skip_waits(monkeypatch, "side", "ready"),
    "the teacher does not wait for free": lambda monkeypatch: _skip_waits(monkeypatch, "lane", "free"),
    "the compute stream does not wait for the copy": lambda monkeypatch: _skip_waits(monkeypatch, "rank's", "free"),
    "the lane's stream does not follow the forward": lambda monkeypatch: monkeypatch.setattr(
        SimStream, "wait_stream", lambda self, other: None
    ),
    "ready is not recorded": lambda monkeypatch: _skip_records(monkeypatch, "ready"),
    "free is not recorded": lambda monkeypatch: _skip_records(monkeypatch, "free"),
}


def _skip_waits(monkeypatch, stream: str, event: str) -> None:
    real = SimStream.wait_event

    def wait(self, until):
        if not (self.name.startswith(stream) and until.name.startswith(event)):
            real(self, until)

    monkeypatch.setattr(SimStream, "wait_event", wait)


def _skip_records(monkeypatch, name: str) -> None:
    real = SimEvent.record
    skips = lambda self, stream: None if self.name.startswith(name) else real(self, stream)  # noqa: E731
    monkeypatch.setattr(SimEvent, "record", skips)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_simulation_sees_a_protocol_that_is_broken(mutant, monkeypatch):
    """What makes the test above one that can fail."""
    MUTANTS[mutant](monkeypatch)
    assert any(_goes_wrong(SimGpu(seed), random.Random(seed), monkeypatch) for seed in range(6))


def _goes_wrong(gpu: SimGpu, choose: random.Random, monkeypatch: pytest.MonkeyPatch) -> bool:
    with met(gpu, monkeypatch, COPY, "ring.depth=1") as pair:
        found = []
        for turn in range(10):
            pending = pair.submit(ids(turn))
            pair.teach()
            gpu.run(choose.randrange(5))
            try:
                found.append(pair.read(pending))
            except TornReply:
                return True
            gpu.run(choose.randrange(5))
        gpu.run()
        return not all(right(rows, ids(turn)) for turn, rows in enumerate(found))


# Slots


@READS
@pytest.mark.parametrize("what", ["an error", "a skip", "a reply that nobody read"])
def test_what_is_not_read_does_not_break_what_comes_next_in_its_slot(read, what, monkeypatch):
    gpu = SimGpu()
    with met(gpu, monkeypatch, read, "ring.depth=1") as pair:
        for turn in range(4):
            gpu.calls.clear()
            odd = pair.submit(torch.full((1, 3), RAISES if what == "an error" else 5))
            if what == "a skip":
                with gpu.process("rank"):
                    odd.cancel()
            pair.teach()
            recorded = gpu.calls.count("lane records ready0")
            assert recorded == (what == "a reply that nobody read"), "an error and a skip seal nothing"
            if what == "an error":
                with pytest.raises(TeacherError):
                    pair.read(odd)
            with gpu.process("rank"):
                odd.cancel()
            sent = ids(turn)
            rows = pair.answer(sent)
            gpu.run()
            assert right(rows, sent)
            assert gpu.syncs == 0


@READS
def test_leaving_a_stream_early_leaves_its_chunks_to_the_next_reply(read, monkeypatch):
    gpu = SimGpu()
    with met(gpu, monkeypatch, read, STREAM) as pair:
        for turn in range(5):
            pending = pair.submit(ids(turn, 2, 6))
            pair.teach()
            with gpu.process("rank"):
                for _ in pending.chunks():
                    break
                pending.cancel()
            pair.teach()
            sent = ids(50 + turn, 2, 6)
            rows = pair.answer(sent)
            gpu.run(turn)
            assert gpu.syncs == 0
            gpu.run()
            assert right(rows, sent)


# Exports


@pytest.mark.parametrize("stand_in", [SimGpu, FakeCuda])
def test_stand_ins_have_all_that_the_module_has(stand_in):
    names = {name for name, what in vars(cuda_ipc).items() if getattr(what, "__module__", "") == cuda_ipc.__name__}
    used = {name for name in names if not name.startswith("_")} - {"MemoryHandle"}
    assert used <= set(dir(stand_in))


class Counting(TorchDispatchMode):
    """Counts operations on the GPU's memory, views included."""

    def __init__(self, gpu: SimGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(self.gpu.has(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)):
            self.calls.append(str(func))
        return func(*args, **kwargs or {})


@READS
def test_a_repeated_request_takes_ten_calls_of_torch_at_most(read, monkeypatch):
    """In submit, wait and release of the rank, for a reply of one output: operations, streams, events, version counters."""
    gpu = SimGpu()
    counting = Counting(gpu)

    def count(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def called(*args, **kwargs):
            counting.calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    with met(gpu, monkeypatch, read, "log.stats_every=0") as pair:
        for name in ("on", "current_stream", "keep_until", "timed_event"):
            count(gpu, name)
        for owner, name in ((SimStream, "wait_event"), (SimEvent, "record"), (SimEvent, "query")):
            count(owner, name)
        count(tensors, "increment_version")
        sent = ids(0)
        for _ in range(4):
            with gpu.process("rank"), counting:
                counting.calls.clear()
                pending = pair.bridge.submit(sent)
                asked = list(counting.calls)
            pair.teach()
            with gpu.process("rank"), counting:
                counting.calls[:] = asked
                with pending.wait():
                    pass
                found = list(counting.calls)
            gpu.run()
        assert len(found) <= 10, found


def test_a_gpu_takes_the_time_of_its_waits_only_for_somebody_who_reads_it(monkeypatch):
    gpu = SimGpu()
    for overrides, expected in ((("log.stats_every=0",), [0, 1]), (("log.stats_every=5",), [1, 2])):
        with met(gpu, monkeypatch, COPY, *overrides) as pair:
            taken = []
            for _ in range(2):
                pair.answer(ids(0))
                taken.append(len(pair.plane("rank")._waits))
                with gpu.process("rank"):
                    pair.bridge.stats()
            assert taken == expected


def test_each_lane_has_an_export_of_its_own(monkeypatch):
    gpu = SimGpu()
    with opened(gpu, monkeypatch, lanes=3) as pair:
        pair.open_teacher()
        assert gpu.exports == 3
        exports = [cuda_slab.Exchange(pair.lane_spec(lane)).read_export(1) for lane in range(3)]
        assert len({export.memory.handle for export in exports}) == 3
        assert len({handle for export in exports for handle in export.ready}) == 3 * exports[0].slots


# A teacher that takes a lane over


def take_over(pair: Pair) -> None:
    """Another teacher's slab for the lane, as it is adopted; what is published before lies in the last one's."""
    with pair.gpu.process("teacher"):
        pair.server._replies._planes[0] = TeacherCudaPlane(pair.lane_spec(), {})


@WAYS
@pytest.mark.parametrize("seed", range(3))
def test_replies_of_two_teachers_in_turn_are_right(overrides, seed, monkeypatch):
    gpu, choose = SimGpu(seed), random.Random(seed)
    with met(gpu, monkeypatch, *overrides, "ring.depth=3") as pair:
        found = []
        for turn in range(24):
            sent = ids(turn, 1, 2)
            pending = pair.submit(sent)
            pair.teach()
            gpu.run(choose.randrange(20))
            if turn % 8 == 5:
                take_over(pair)
            found.append((sent, pair.read(pending)))
            gpu.run(choose.randrange(20))
        gpu.run()
        assert all(right(rows, sent) for sent, rows in found)
        assert gpu.exports == 4


@pytest.mark.parametrize("what", ["errors", "skips"])
def test_a_new_teacher_of_which_nothing_was_read_needs_no_answer(what, monkeypatch):
    gpu = SimGpu()
    with met(gpu, monkeypatch, COPY, "ring.depth=2") as pair:
        take_over(pair)
        for _ in range(2):
            odd = pair.submit(torch.full((1, 3), RAISES if what == "errors" else 5))
            with gpu.process("rank"):
                if what == "skips":
                    odd.cancel()
                pair.teach()
                odd.cancel()
        sent = ids(7)
        rows = pair.answer(sent)
        gpu.run()
        assert right(rows, sent)


@pytest.mark.parametrize("refused", [False, True])
def test_a_rank_that_opens_a_new_teachers_slab_stands_at_its_reply(refused, monkeypatch):
    """Opening waits for an event of that teacher's, which may be killed meanwhile: the watchdog must know."""
    gpu, real, seen = SimGpu(), cuda_slab.Opened, []

    def opened(export, device):
        seen.append(rank.stands_at())
        if refused:
            raise AttachError("refused")
        return real(export, device)

    with met(gpu, monkeypatch, COPY) as pair:
        rank = pair.plane("rank")
        take_over(pair)
        pending = pair.submit(ids(0))
        pair.teach()
        monkeypatch.setattr(cuda_slab, "Opened", opened)
        with suppress(AttachError):
            pair.read(pending)
        gpu.run()
        assert seen == [(rank.teachers()[0], 0)]
        assert rank.stands_at() is None


@READS
def test_a_teacher_that_died_without_an_answer_is_passed_over(read, monkeypatch):
    """Handles of a process that is gone do not open."""
    gpu = SimGpu()
    with met(gpu, monkeypatch, read, "ring.depth=2") as pair:
        first = pair.submit(ids(0))
        pair.teach()
        for _ in range(2):
            take_over(pair)
            gpu._memories.clear()
        before = pair.read(first)
        take_over(pair)  # one more than the exchange keeps
        after = pair.answer(ids(1))
        gpu.run()
        assert right(before, ids(0))
        assert right(after, ids(1))


def test_a_reply_of_a_teacher_that_the_exchange_no_longer_has_is_refused(monkeypatch):
    with met(SimGpu(), monkeypatch, COPY) as pair:
        pending = pair.submit(ids(0))
        pair.teach()
        for _ in range(3):
            take_over(pair)
        with pytest.raises(AttachError, match="went through 2 teachers since .* last checkpoint"):
            pair.read(pending)


def test_what_was_opened_of_a_dead_teacher_is_closed_when_no_read_of_the_rank_is_on_its_way(monkeypatch):
    """Closing waits for the device, which may wait for an event of the dead one."""
    gpu = SimGpu()
    with met(gpu, monkeypatch, COPY, "ring.depth=2") as pair:

        def follow(turns: int) -> None:
            for turn in range(turns):
                take_over(pair)
                pair.answer(ids(turn))

        first = weakref.ref(pair.plane("rank")._opened[1].slab)
        side = pair.stream("side")
        side.held = True
        follow(4)
        assert first() is not None
        side.held = False
        gpu.run()
        follow(1)
        assert first() is None


# The end


@READS
def test_a_teacher_ends_when_the_rank_has_read_and_asks_no_event_of_another_process(read, monkeypatch):
    gpu = SimGpu()
    open_event = gpu.open_event

    class Imported:
        def __init__(self, event: SimEvent) -> None:
            self.event, self.name = event, event.name

        latest = property(lambda self: self.event.latest)

        def query(self) -> bool:
            raise AssertionError("whether it answers is not known")

    monkeypatch.setattr(gpu, "open_event", lambda handle, device: Imported(open_event(handle, device)))
    with met(gpu, monkeypatch, read) as pair:
        pending = pair.submit(ids(0))
        pair.teach()
        gpu.run()
        reader = pair.stream("side" if read == COPY else "rank's compute")
        reader.held = True
        teacher = pair.plane("teacher")
        with gpu.process("teacher"):
            assert not teacher.settled()
        pair.read(pending)
        gpu.run()
        with gpu.process("teacher"):
            assert not teacher.settled(), "the rank's GPU still reads"
            gpu.run()
            assert not teacher.settled()
            reader.held = False
            gpu.run()
            assert teacher.settled()


# Stamps


def no_stamp(self, number):
    self._begin(number)
    self._slab.ready[number % self._slab.slots].record(self._stream)


def stamped(value) -> object:
    """A seal with another stamp."""

    def seal(self, number):
        with cuda_slab.cuda_ipc.on(self._stream):
            self._slab.stamps[number % self._slab.slots].fill_(value(self._slab.generation, number))
        no_stamp(self, number)

    return seal


of_an_earlier_generation = stamped(lambda generation, number: cuda_slab.stamp(generation - 1, number))
SEALS = {"none": no_stamp, "wrong": stamped(lambda *_: 12345), "earlier": of_an_earlier_generation}


@pytest.mark.parametrize("seal", SEALS)
@WAYS
def test_a_torn_reply_is_nan_in_every_position_and_a_later_call_raises(overrides, seal, monkeypatch):
    gpu = SimGpu()
    real = TeacherCudaPlane.seal
    torn = {4, 5}  # the second use of some slots, which hold the stamp of the first
    monkeypatch.setattr(TeacherCudaPlane, "seal", lambda self, n: (SEALS[seal] if n in torn else real)(self, n))
    with met(gpu, monkeypatch, *overrides, "ring.depth=2") as pair:
        found = [pair.answer(ids(turn, 1, 3)) for turn in range(6)]
        gpu.run()
        assert all(right(rows, ids(turn, 1, 3)) for turn, rows in enumerate(found[:4]))
        assert all(rows.isnan().any(-1).all() for rows in found[4:])
        with pytest.raises(TornReply, match=r"reply 4 does not carry its stamp, .* last checkpoint"):
            pair.answer(ids(6))


@READS
def test_each_float_output_has_a_nan_in_every_position(read, monkeypatch):
    """Also where a position has one number; others cannot hold a NaN."""
    gpu = SimGpu()
    monkeypatch.setattr(TeacherCudaPlane, "seal", no_stamp)

    def forward(self, batch):
        rows, given = TABLE[batch.input_ids], batch.input_ids
        outputs = {"rows": rows, "half": rows.half(), "each": given.float(), "ids": given}
        return {name: self.gpu.put(output) for name, output in outputs.items()}

    monkeypatch.setattr(Pair, "forward", forward)
    with met(gpu, monkeypatch, read) as pair:
        pending = pair.submit(ids(0))
        pair.teach()
        with gpu.process("rank"):
            reply = pending.copy()
        gpu.run()
        for name in ("rows", "half"):
            assert reply[name].isnan().any(-1).all()
        assert reply["each"].isnan().all()
        assert torch.equal(reply["ids"], ids(0))


@READS
def test_a_gpu_stands_at_a_read_only_once_its_stream_has_come_to_it(read, monkeypatch):
    """Work of the student's that was launched before, however long, is no standstill of the reply's."""
    gpu = SimGpu()
    with met(gpu, monkeypatch, read) as pair:
        lane = pair.stream("lane")
        lane.held = True
        pending = pair.submit(ids(0))
        pair.teach()
        rank = pair.plane("rank")
        with gpu.process("rank"), pending.wait():
            if read == IN_PLACE:
                assert rank.waits_for() and rank.stands_at() is None
            gpu.run()
            assert rank.stands_at() == (rank.waits_for(), 0)
            lane.held = False
            gpu.run()
            assert rank.stands_at() is None


@READS
def test_looking_at_stamps_does_not_wait_for_the_gpu(read, monkeypatch):
    """A rank's host may run ahead by 256 replies; only then it waits."""
    gpu = SimGpu()
    with met(gpu, monkeypatch, read, "ring.depth=4") as pair:
        for turn in range(256):
            pair.answer(ids(turn, 1, 2))
        assert gpu.syncs == 0
        assert len(pair.plane("rank")._reads._pending) == 256
        assert pair.plane("rank").waits_for()
        rows = pair.answer(ids(256, 1, 2))
        assert gpu.syncs == 1
        gpu.run()
        assert right(rows, ids(256, 1, 2))
        assert not pair.plane("rank").waits_for()
        for turn in range(300):  # places on the host are used again
            pair.answer(ids(turn, 1, 2))
            gpu.run(3)
        gpu.run()
        pair.plane("rank").check()


def test_a_stream_that_stands_still_holds_up_nobodys_host(monkeypatch):
    """The rank died with its stream in the middle: the teacher's host writes on, into a stream that waits."""
    gpu = SimGpu()
    with met(gpu, monkeypatch, COPY, "ring.depth=2", "timeouts.shutdown_s=0.1") as pair:
        side = pair.stream("side")  # the second one opened the slab
        side.held = True
        for turn in range(10):
            pair.answer(ids(turn))
            gpu.run()
        lane = pair.stream("lane")
        assert gpu.syncs == 0
        assert lane.tasks, "it waits for the slot's last read"


# Opening


def another_namespace(pair, monkeypatch):
    pair.gpu.namespace = 2


def another_torch(pair, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.1.0")


def no_peer_access(pair, monkeypatch):
    pair.gpu.broken_open = RuntimeError("CUDA error: peer access is not supported between these two devices")


def other_bytes(pair, monkeypatch):
    pair.gpu.run()
    pair.plane("teacher")._slab.memory.add_(1)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (another_torch, r"the teacher has torch .*, this process 2\.1\.0: .*plane=host"),
        (another_namespace, r"another PID namespace.*--pid=host.*plane=host"),
        (no_peer_access, r"peer access is not supported.*plane=host"),
        (other_bytes, r"access between the two is broken.*plane=host"),
    ],
)
def test_what_cannot_be_opened_is_told_with_the_remedy(what, told, monkeypatch):
    with opened(SimGpu(), monkeypatch) as pair:
        pair.open_teacher()
        what(pair, monkeypatch)
        with pytest.raises(AttachError, match=told) as caught:
            pair.open_rank()
        assert caught.value.__cause__ is None


def test_no_room_for_the_slab_is_told_with_the_ways_out(monkeypatch):
    gpu = SimGpu()
    gpu.full = True
    with (
        opened(gpu, monkeypatch) as pair,
        pytest.raises(PlanError, match=r"MiB, which .* does not have\. .*ring\.depth.*payload\.topk.*plane=host"),
    ):
        pair.open_teacher()


def exchange(pair: Pair) -> Segment:
    token = pair.token
    name = Names(token.session_id).reply(token.generation, 0)
    return Segment.attach(name, layout.REPLY, token.session_id, token.generation, 0)


@pytest.mark.parametrize("seed", range(40))
def test_garbled_handles_are_an_attach_error_whatever_they_say(seed, monkeypatch):
    """Random bytes, cut, or words of the JSON exchanged for others."""
    choose = random.Random(seed)
    with opened(SimGpu(), monkeypatch) as pair:
        pair.open_teacher()
        segment = exchange(pair)
        nbytes = segment.words[layout.ExchangeWord.EXPORT_NBYTES]
        text = bytes(segment.bytes[layout.PAGE : layout.PAGE + nbytes])
        text = (
            choose.randbytes(nbytes),
            text[: choose.randrange(nbytes)],
            text.replace(b'"slots":2', b'"slots":%d' % choose.choice((0, 3, -1, 2**63, 10**30))),
            text.replace(b'"stride":', b'"stride":%d' % choose.randrange(1, 10)),
            text.replace(b'"generation":1', b'"generation":%d' % choose.choice((-1, 2, 2**21, 2**70))),
            text.replace(b'"checksum":', b'"checksum":1'),
            text.replace(b'"nbytes":', b'"nbytes":-'),
            choose.randbytes(3).join((text[: nbytes // 2], text[nbytes // 2 + 3 :])),
        )[seed % 8]
        segment.bytes[layout.PAGE : layout.PAGE + nbytes] = bytes(nbytes)
        segment.bytes[layout.PAGE : layout.PAGE + len(text)] = text
        segment.words[layout.ExchangeWord.EXPORT_NBYTES] = len(text)
        with pytest.raises(AttachError):
            pair.open_rank()


def test_a_segment_of_another_size_is_an_attach_error(monkeypatch):
    with opened(SimGpu(), monkeypatch) as pair:
        pair.open_teacher()
        found = exchange(pair).bytes.nbytes
        with pytest.raises(AttachError, match=f"has {found} bytes, expected 4096: garbled"):
            pair.lane_spec().attach(4096)


@pytest.mark.parametrize("nbytes", [0, 1, 10**6, 2**64 - 1])
def test_a_garbled_length_is_an_attach_error(nbytes, monkeypatch):
    with opened(SimGpu(), monkeypatch) as pair:
        pair.open_teacher()
        exchange(pair).words[layout.ExchangeWord.EXPORT_NBYTES] = nbytes
        with pytest.raises(AttachError):
            pair.open_rank()


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"{}", b"[]", b"\0" * 50, b'{"of":2,"free":["AAAA"]}'),
        b'{"of":1,"free":[]}',
        b'{"of":1,"free":["AAAA"]}',
    ],
)
def test_garbled_handles_of_a_rank_are_an_attach_error_in_the_teacher(garbage, monkeypatch):
    with met(SimGpu(), monkeypatch, COPY, "ring.depth=1") as pair:
        segment = exchange(pair)
        at = layout.PAGE + 2 * layout.exchange_capacity(1)
        segment.bytes[at : at + len(garbage)] = garbage
        segment.words[layout.ExchangeWord.IMPORTED_NBYTES] = len(garbage)
        pair.submit(ids(0))
        with pytest.raises(AttachError):
            pair.teach()


def test_handles_of_many_chunks_fit_into_the_exchange(monkeypatch):
    """CUDA's event handles have 64 bytes; those of one lane's slots must fit whatever their number."""
    gpu = SimGpu()
    monkeypatch.setattr(gpu, "export_event", lambda event: event.name.encode().ljust(64, b"."))
    monkeypatch.setattr(gpu, "open_event", lambda handle, device: gpu._events[handle.rstrip(b".")])
    with met(gpu, monkeypatch, COPY, "payload.stream={chunk_positions: 1, chunks: 500}") as pair:
        sent = ids(0, 8, 8)
        rows = pair.answer(sent)
        gpu.run()
        assert right(rows, sent)
