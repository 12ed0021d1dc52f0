"""The teacher's rounds, step by step: a server and its ranks in one process, without a wait between them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from shmbridge import config
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher import output_discovery
from shmbridge.teacher.batch import Batch, Forward
from shmbridge.teacher.payload import Selection
from shmbridge.teacher.server import Server

CPU = torch.device("cpu")
STREAM = "payload.stream={chunk_positions: 4, chunks: 3}"


class Scene:
    """A session with a teacher and its ranks."""

    def __init__(self, owner: Owner, lanes: int, forward: Forward, settings: config.Config) -> None:
        token = owner.start_generation()
        self.session = TeacherSession(token)
        agreed, encoder = output_discovery.make(forward, settings, CPU)
        owner.create_replies(agreed)
        self.session.publish(agreed)
        assert self.session.next_generation()
        self.server = Server(self.session, forward, encoder, agreed, CPU)
        self.session.open_barrier()
        self.collector, self.replies = self.server._collector, self.server._replies
        self.bridges = [Bridge(RankSession(token, lane)) for lane in range(lanes)]
        for bridge in self.bridges:
            bridge.wait_ready()

    def rings(self) -> list:
        return [lane.ring for lane in self.session.served]

    @torch.inference_mode()
    def answer(self) -> int:
        """Answer the requests that are there. Returns how many they were."""
        answers = self.collector._take_or_end() or []
        if answers:
            self.server._answer(answers)
            self.collector.answered(answers)
        return len(answers)


@contextmanager
def scene(forward: Forward, *overrides: str, lanes: int = 2) -> Iterator[Scene]:
    fixed = ["teacher.model=tests:teacher", "parity=false", "ring.max_tokens=256"]
    settings = config.load(overrides=[*fixed, *overrides])
    with Owner(settings, lanes) as owner:
        it = Scene(owner, lanes, forward, settings)
        try:
            yield it
        finally:
            for bridge in it.bridges:
                bridge.close()


def doubled(batch: Batch) -> dict[str, torch.Tensor]:
    return {"twice": 2 * batch.input_ids}


def row(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


def test_who_was_in_the_last_forward_is_waited_for_half_as_long_as_it_took(monkeypatch):
    with scene(doubled, "teacher.linger_ms=1000", "ring.depth=8") as it:
        first, second = it.bridges
        waits: list[tuple[float | None, object]] = []  # deadline, and what was there
        late: list[Callable[[], object]] = []

        def wait(ready, deadline, check):
            if len(waits) == 2 and late:
                late.pop()()
            waits.append((deadline, ready()))
            return waits[-1][1]

        def collect() -> list[int]:
            waits.clear()
            answers = it.collector.collect()
            it.server._answer(answers)
            for answer in answers:
                answer.composition = answer.composition._replace(forward_ns=60 * 10**9)
            it.collector.answered(answers)
            return [answer.lane.index for answer in answers]

        monkeypatch.setattr(it.session, "wait", wait)
        sent = [first.submit(row(1)), second.submit(row(1))]
        assert collect() == [0, 1]
        assert len(waits) == 1, "nobody is missing"
        sent.append(first.submit(row(1)))
        late.append(lambda: sent.append(second.submit(row(1))))
        assert collect() == [0, 1]
        (_, (linger, nobody), (half, there)) = waits
        assert half - linger == pytest.approx(30 - 1, abs=0.1), "half of the last forward, in place of linger_ms"
        assert (nobody, there) == (None, True)
        sent.append(first.submit(row(1)))
        assert collect() == [0]
        assert waits[2][1] is None, "rank 1 was in the last forward, and has not come"
        sent.append(first.submit(row(1)))
        assert collect() == [0]
        assert waits[2][1] is True, "rank 1 was not in it, and is not waited for"
        assert all(torch.equal(pending.copy()["twice"], row(2)) for pending in sent)


def test_a_rank_that_keeps_pace_with_its_stream_does_not_keep_the_others_from_the_teacher():
    with scene(doubled, STREAM) as it:
        long, short = it.bridges
        streamed = long.submit(torch.arange(80).reshape(1, 80))
        assert it.answer() == 1
        chunks = streamed.chunks()
        for number in range(1, 4):
            assert it.replies.advance(), "there is room for the next chunk"
            assert it.rings()[0].streamed == number, "one chunk at a time"
            next(chunks)
        other = short.submit(row(3))
        assert it.answer() == 1
        it.replies.advance()
        assert it.rings()[1].streamed == 1
        assert it.rings()[0].streamed < 10
        assert other.copy()["twice"].item() == 6
        streamed.cancel()


@pytest.mark.parametrize("batch", [1, 50])
def test_what_waits_for_a_reader_is_no_view_of_the_whole_forward(batch):
    """Nor does the round keep it: once rank 1 has read its reply, nothing of the forward is left."""
    alive: list[weakref.ref] = []

    def forward(given: Batch) -> dict[str, torch.Tensor]:
        output = (2 * given.input_ids).numpy()
        alive.append(weakref.ref(output))
        return {"twice": torch.from_numpy(output)}

    with scene(forward, STREAM) as it:
        alive.clear()
        pending = [it.bridges[0].submit(torch.ones(batch, 5, dtype=torch.int64)), it.bridges[1].submit(row(1, 2, 3))]
        assert it.answer() == 2
        gc.collect()
        assert [one() for one in alive] == [None]
        it.replies.advance()
        assert pending[1].copy()["twice"].tolist() == [[2, 4, 6]]
        pending[0].cancel()


def test_what_is_kept_twice_after_running_out_of_memory_is_sent_once(monkeypatch):
    """The rows of the first request were kept when memory ran out for those of the second."""
    kept, calls = Selection.kept, []

    def keep(self: Selection) -> Selection:
        calls.append(self)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kept(self)

    monkeypatch.setattr(Selection, "kept", keep)
    with scene(doubled, STREAM) as it:
        pending = [bridge.submit(row(1 + lane)) for lane, bridge in enumerate(it.bridges)]
        assert it.answer() == 2
        it.replies.advance()
        assert [one.copy()["twice"].item() for one in pending] == [2, 4]
        assert [ring.streamed for ring in it.rings()] == [1, 1]
