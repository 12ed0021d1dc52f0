"""A teacher that follows another, a generation that follows another: with real processes, killed at chosen points."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from launcher.console.terminal import Console
from launcher.hang.monitor import Monitor
from shmbridge.errors import AttachError, PeerLost
from shmbridge.output_spec import Offer
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.layout import LaneWord
from shmbridge.shm.participant_record import Failure, Phase
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher import main as teacher_main
from tests.harness import Bench, Child, switches, until

DEADLY = 13


class Doubling:
    """Twice the IDs, and by whom; killed in the forward of DEADLY unless `once` is there."""

    vocab_size = 1000

    def __init__(self, once: Path | None = None, who: int = 0, gate: Path | None = None) -> None:
        self.once, self.who, self.gate = once, who, gate

    def __call__(self, batch):
        if self.once and (batch.input_ids == DEADLY).any() and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.gate and (batch.input_ids == DEADLY).any():
            until(self.gate.exists)
        return {"answer": batch.input_ids * 2, "who": torch.full_like(batch.input_ids, self.who)}


class Wide(Doubling):
    vocab_size = 2000


class Run(Bench):
    """A bench whose teachers follow one another."""

    def __init__(
        self, lanes: int = 1, teachers: int = 1, *overrides: str, forward: Doubling | None = None, ready: bool = True
    ) -> None:
        """Teachers that are `ready`, of which the first has this `forward`."""
        super().__init__(lanes, "ring.max_tokens=64", "teacher.restarts=9", *overrides, teachers=teachers)
        forwards = [forward or Doubling(), *(Doubling(who=who) for who in range(1, teachers))]
        self.first, *_ = [self.serve(each, index) for index, each in enumerate(forwards)]
        try:
            if ready:
                self.agree()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, forward: Doubling, index: int = 0) -> Child:
        """A teacher; reply memory is created once all have offered."""
        token = self.token
        return self.start(lambda: serve(token, index, forward))

    def agree(self) -> None:
        """The reply memory of the generation, once every teacher has offered."""
        self.owner.create_replies(until(self.owner.offered, "the offers"))
        for index in range(len(self.owner.control.teachers)):
            self.ready(index)

    def lose(self, child: Child, index: int = 0) -> None:
        """The launcher's part in a death: nothing of the teacher is left, and its place is free."""
        child.kill()
        assert child.join() == -signal.SIGKILL
        self.owner.control.teachers[index].clear()

    def lose_for_good(self) -> None:
        """The launcher's part where on_teacher_lost is continue."""
        self.first.kill()
        self.first.join()
        self.owner.control.teachers[0].lost = True
        self.owner.ring_all()

    def next_generation(self, lanes: int | None = None) -> None:
        self.owner.end_training()
        self.token = self.owner.start_generation(lanes)

    def ready(self, index: int = 0) -> None:
        until(lambda: self.owner.control.teachers[index].ready == self.owner.generation, "the new teacher")


def serve(token, index, forward) -> None:
    torch.set_num_threads(1)
    teacher_main.serve(TeacherSession(token, index), forward, torch.device("cpu"))


def ids(step: int) -> torch.Tensor:
    return torch.full((1, 8), step)


def check(reply, step: int) -> int:
    """It answers `step`; by whom."""
    assert reply.sequence == step
    assert torch.equal(reply["answer"], 2 * ids(step))
    return int(reply["who"][0, 0])


@pytest.mark.every_plane
def test_a_request_in_a_killed_forward_is_answered_by_the_next_teacher(tmp_path):
    once = tmp_path / "once"
    with Run(forward=Doubling(once)) as run:
        rank = run.rank(0, lambda bridge: [check(bridge.exchange(ids(i)), i) for i in range(20)])
        until(once.exists)
        run.lose(run.first)
        run.serve(Doubling(once, who=1))
        assert rank.join() == 0


def test_what_is_prefetched_while_no_teacher_is_there_is_answered_in_order(tmp_path):
    """Killed between replies, with its ring full."""
    with Run(1, 1, "ring.depth=4") as run, run.bridge() as bridge:
        for step, (_, pending) in enumerate(bridge.prefetch(map(ids, range(20)))):
            if step == 5:
                run.lose(run.first)
                run.serve(Doubling(who=1))
            check(pending.copy(), step)
        assert bridge.exchange(ids(20))["who"][0, 0] == 1


def test_a_second_death_before_the_first_reply_is_outlived_too(tmp_path):
    with Run() as run, run.bridge() as bridge:
        bridge.wait_ready()
        run.lose(run.first)
        pending = bridge.submit(ids(DEADLY))
        second = run.serve(Doubling(gate=tmp_path / "never", who=1))
        until(lambda: run.owner.control.teachers[0].identity)
        run.lose(second)
        run.serve(Doubling(who=2))
        reply = pending.copy()
        assert torch.equal(reply["answer"], 2 * ids(DEADLY))
        assert (reply["who"] == 2).all()


@pytest.mark.every_plane
def test_a_stream_that_is_cut_goes_on_at_its_position():
    with Run(1, 1, "payload.stream={chunk_positions: 3, chunks: 2}") as run, run.bridge() as bridge:
        sent = torch.arange(20).reshape(1, 20)
        for repeat in range(2):
            found, rows_seen, who = torch.zeros(20, dtype=torch.int64), [], []
            for rows, chunk in bridge.submit(sent + repeat).chunks():
                found[rows] = chunk["answer"]
                rows_seen.append((rows.start, rows.stop))
                who.append(int(chunk["who"][0]))
                if len(who) == 2 and repeat == 0:
                    until(lambda: run.owner.lanes[0].ring.streamed == 3)  # it is ahead of its reader
                    run.lose(run.first)
                    run.serve(Doubling(who=1))
            assert torch.equal(found, 2 * (torch.arange(20) + repeat))
            assert rows_seen == [(i, min(i + 3, 20)) for i in range(0, 20, 3)]
            assert who == ([0, 0, 0, 1, 1, 1, 1] if repeat == 0 else [1] * 7)


def test_a_stream_whose_chunks_are_all_there_ends_with_the_next_teacher(tmp_path):
    """Killed when every chunk is published and the reply is not: nothing is sent twice."""
    with Run(1, 1, "payload.stream={chunk_positions: 4, chunks: 4}") as run, run.bridge() as bridge:
        pending = bridge.submit(ids(0))
        ring = run.owner.lanes[0].ring
        until(lambda: ring.replied == 1)
        run.lose(run.first)
        ring.words[LaneWord.REPLIED] = 0  # as if the kill had come one line before
        run.serve(Doubling(who=1))
        check(pending.copy(), 0)
        assert (ring.streamed, ring.replied) == (2, 1)


def test_a_new_teacher_that_offers_something_else_waits_to_be_refused():
    with Run() as run:
        agreed = run.owner.offered()
        run.lose(run.first)
        other = run.serve(Wide())
        record = run.owner.control.teachers[0]
        offered = Offer.decode(until(lambda: record.offer))
        assert offered.differs(agreed) == "vocab_size 2000, not 1000"
        sleeps = switches(other.pid)
        until(lambda: switches(other.pid) > sleeps + 1)  # it has looked twice
        assert not record.ready
        other.end()


# Replicas


@pytest.mark.every_plane
def test_the_lane_of_a_dead_replica_is_served_by_the_other_and_handed_back(tmp_path):
    """The request is in the dead one's forward; afterwards each has its lane again, and nothing is answered twice."""
    with (
        Run(2, 2, forward=Doubling(gate=tmp_path / "never")) as run,
        run.bridge(0) as bridge,
        run.bridge(1) as other,
    ):
        other.wait_ready()
        for step in range(DEADLY):
            check(bridge.exchange(ids(step)), step)
        pending = bridge.submit(ids(DEADLY))
        until(lambda: run.owner.control.teachers[0].sequence == DEADLY)
        run.lose(run.first)
        died = time.monotonic()
        run.owner.hand_over(0, 1)
        assert check(pending.copy(), DEADLY) == 1
        assert time.monotonic() - died < 1
        assert check(bridge.exchange(ids(DEADLY + 1)), DEADLY + 1) == 1
        check(other.exchange(ids(0)), 0)
        run.serve(Doubling(who=2), 0)  # which has no lane of its own yet, and must not end for that
        run.ready(0)
        run.owner.ask_to_hand_over(0, 0)
        step = DEADLY + 2
        until(lambda: run.owner.lanes[0].teacher == 0)
        assert check(bridge.exchange(ids(step)), step) == 2
        assert check(other.exchange(ids(1)), 1) == 1
        assert run.owner.lanes[0].ring.replied == step + 1


def test_a_lane_changes_hands_while_its_rank_never_stops(tmp_path):
    """Back and forth, with the ring always full."""
    with Run(2, 2, "ring.depth=3") as run:
        stop = tmp_path / "stop"

        def train(bridge: Bridge) -> None:
            served = set()
            for step, (_, pending) in enumerate(bridge.prefetch(ids(i % 900) for i in range(100_000))):
                reply = pending.copy()
                assert reply.sequence == step
                assert torch.equal(reply["answer"], 2 * ids(step % 900))
                served.add(int(reply["who"][0, 0]))
                if stop.exists():
                    break
            assert served == {0, 1}

        ranks = [run.rank(0, train), run.rank(1, lambda bridge: busy(bridge, stop))]
        for turn in range(8):
            to = 1 - turn % 2
            before = until(lambda: run.owner.lanes[0].ring.replied)
            run.owner.ask_to_hand_over(0, to)
            until(lambda to=to: run.owner.lanes[0].teacher == to, "the hand-over")
            until(lambda before=before: run.owner.lanes[0].ring.replied > before + 5, "replies")
        stop.touch()
        assert [rank.join() for rank in ranks] == [0, 0]


def busy(bridge: Bridge, stop: Path) -> None:
    """Keeps its teacher busy: a request is always there."""
    for _, pending in bridge.prefetch(ids(i % 900) for i in range(100_000)):
        pending.copy()
        if stop.exists():
            break


def test_a_busy_replica_takes_the_lane_of_a_dead_one(tmp_path):
    """It never comes to the end of a waiting slice."""
    with Run(2, 2, "ring.depth=3") as run:
        stop = tmp_path / "stop"
        rank = run.rank(1, lambda bridge: busy(bridge, stop))
        with run.bridge(0) as bridge:
            bridge.wait_ready()
            until(lambda: run.owner.lanes[1].ring.replied > 5)
            run.lose(run.first)
            run.owner.hand_over(0, 1)
            assert check(bridge.exchange(ids(0)), 0) == 1
        stop.touch()
        assert rank.join() == 0


def test_a_stream_is_finished_before_its_lane_is_handed_over():
    with Run(2, 2, "payload.stream={chunk_positions: 3, chunks: 2}") as run, run.bridge(0) as bridge, run.bridge(1):
        chunks = bridge.submit(ids(0).repeat(1, 2)).chunks()
        next(chunks)
        run.owner.ask_to_hand_over(0, 1)
        sleeps = switches(run.children[0].pid)
        until(lambda: switches(run.children[0].pid) > sleeps + 1)
        assert run.owner.lanes[0].teacher == 0
        assert [int(chunk["who"][0]) for _, chunk in chunks] == [0] * 5
        until(lambda: run.owner.lanes[0].teacher == 1)
        assert check(bridge.exchange(ids(1)), 1) == 1


def test_a_cut_stream_goes_on_at_the_other_replica():
    with Run(2, 2, "payload.stream={chunk_positions: 3, chunks: 2}") as run, run.bridge(0) as bridge, run.bridge(1):
        sent = torch.arange(20).reshape(1, 20)
        found, who = torch.zeros(20, dtype=torch.int64), []
        for rows, chunk in bridge.submit(sent).chunks():
            found[rows] = chunk["answer"]
            who.append(int(chunk["who"][0]))
            if len(who) == 2:
                until(lambda: run.owner.lanes[0].ring.streamed == 3)
                run.lose(run.first)
                run.owner.hand_over(0, 1)
        assert torch.equal(found, 2 * torch.arange(20))
        assert who == [0, 0, 0, 1, 1, 1, 1]


# Without a teacher


def losing(tmp_path: Path, *overrides: str) -> Run:
    """One rank, whose teacher may be lost, such as in the forward of DEADLY."""
    forward = Doubling(gate=tmp_path / "never")
    return Run(1, 1, "teacher.restarts=0", "on_teacher_lost=continue", *overrides, forward=forward)


def test_training_goes_on_with_missing_replies(tmp_path, caplog):
    with losing(tmp_path, "ring.depth=3") as run:
        with run.bridge() as bridge:
            prefetched = bridge.prefetch([ids(0), *[ids(DEADLY)] * 6])
            _, pending = next(prefetched)
            check(pending.copy(), 0)
            _, pending = next(prefetched)
            until(lambda: run.owner.control.teachers[0].sequence == 1)
            run.lose_for_good()
            with pending.wait() as reply:
                assert reply.missing
            assert bridge.free_slots == 3
            assert all(pending.copy().missing for _, pending in prefetched)
            assert bridge.exchange(ids(1)).missing
            (only,) = bridge.submit(ids(1)).chunks()
            assert only[1].missing
            dropped = [bridge.submit(ids(1)) for _ in range(9)]
            assert all(pending.done for pending in dropped)
            dropped[0].cancel()
            assert bridge.stats()
        assert caplog.text.count("Replies are missing from now on") == 1


def test_drawn_batches_that_were_not_sent_are_missing_once_the_teacher_is_lost(tmp_path):
    with losing(tmp_path, "ring.depth=2") as run, run.bridge() as bridge:
        drawn = [pending for _, pending in bridge.prefetch([ids(0), *[ids(DEADLY)] * 4])]
        check(drawn[0].copy(), 0)
        assert [pending.sequence for pending in drawn] == [0, 1, 2, None, None]
        until(lambda: run.owner.control.teachers[0].sequence == 1)
        run.lose_for_good()
        drawn[3].cancel()
        for pending in (drawn[1], drawn[2], drawn[4]):
            with pending.wait() as reply:
                assert reply.missing
        assert drawn[4].done
        assert bridge.free_slots == 2


@pytest.mark.one_plane
def test_training_without_a_teacher_is_seen_to_move(tmp_path):
    """No hang is reported, however long it goes on; and once its loop stands still, one is."""
    with losing(tmp_path, "timeouts.report_s=20") as run, run.bridge() as bridge:
        record, now = run.owner.lanes[0].records[0], 0.0
        monitor = Monitor(run.owner, run.settings, tmp_path, Console())
        pending = bridge.submit(ids(DEADLY))
        until(lambda: run.owner.control.teachers[0].sequence == 0)
        run.lose_for_good()
        assert pending.copy().missing
        assert record.phase is Phase.TRAINING
        for step in (None, 7, 8):
            for _ in range(20):
                now += 2
                assert bridge.exchange(ids(1), step=step).missing
                assert not monitor.due(now)
            assert record.step == step
        assert any(monitor.due(now + 5 * tick) for tick in range(1, 9))


def test_a_submit_that_waits_for_a_cancelled_slot_goes_on_without_a_teacher(tmp_path):
    with losing(tmp_path, "ring.depth=1") as run, run.bridge() as bridge:
        pending = bridge.submit(ids(DEADLY))
        until(lambda: run.owner.control.teachers[0].sequence == 0)
        pending.cancel()
        run.lose_for_good()
        assert bridge.exchange(ids(1)).missing


def test_a_stream_that_is_cut_for_good_ends_with_a_missing_chunk(tmp_path):
    with (
        losing(tmp_path, "payload.stream={chunk_positions: 3, chunks: 2}") as run,
        run.bridge() as bridge,
    ):
        rows, missing = [], []
        for at, chunk in bridge.submit(torch.zeros((1, 20), dtype=torch.int64)).chunks():
            rows.append((at.start, at.stop))
            missing.append(chunk.missing)
            if len(rows) == 1:
                until(lambda: run.owner.lanes[0].ring.streamed == 2)
                run.lose_for_good()
        assert missing[0] is False and missing[-1] is True and missing.count(True) == 1
        assert rows[-1][1] == 20 and [start for start, _ in rows[1:]] == [stop for _, stop in rows[:-1]]
        assert bridge.submit(ids(0)).copy().missing


# Generations


@pytest.mark.every_plane
def test_the_next_generation_is_served_by_the_same_teacher_and_nothing_of_the_old_reaches_it():
    with Run(1, 1, "train.restarts=1", "ring.depth=4") as run:
        old = run.bridge()
        pendings = [old.submit(ids(i)) for i in range(3)]
        until(lambda: run.owner.lanes[0].ring.replied == 3)
        late = run.token
        run.next_generation()
        run.agree()
        with run.bridge() as bridge:
            assert bridge.submit(ids(0)).sequence == 0
            check(bridge.exchange(ids(1)), 1)
        try:
            RankSession(late, 0)
        except AttachError as error:
            assert "left behind by a restart" in str(error)
        else:
            raise AssertionError("an old rank got in")
        del pendings
        old.close()
        assert run.first.poll() is None


@pytest.mark.one_plane
def test_a_teacher_keeps_no_doorbell_of_an_earlier_generation():
    with Run(4, 1, "train.restarts=9") as run:
        mapped = []
        for _ in range(4):
            run.next_generation()
            run.agree()
            mapped.append(doorbells(run.first.pid))
        assert len(set(mapped)) == 1, mapped


class Cramped(Doubling):
    """Runs out of memory over more than two rows, until `freed` is there. `failures`: a byte for each time."""

    def __init__(self, freed: Path, failures: Path) -> None:
        super().__init__()
        self.freed, self.failures = freed, failures

    def __call__(self, batch):
        if len(batch.input_ids) > 2 and batch.input_ids.shape[1] == 8 and not self.freed.exists():
            with self.failures.open("ab") as file:
                file.write(b".")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return super().__call__(batch)


@pytest.mark.one_plane
def test_the_size_that_a_forward_may_have_outlives_a_generation_and_grows_again(tmp_path):
    freed, failures = tmp_path / "freed", tmp_path / "failures"
    wide = ids(1).repeat(8, 1)

    def rows(bridge: Bridge) -> int:
        """Of the last forward of a request of eight rows."""
        reply = bridge.exchange(wide)
        assert torch.equal(reply["answer"], 2 * wide)
        return reply.composition.rows

    with Run(1, 1, "train.restarts=1", forward=Cramped(freed, failures)) as run:
        with run.bridge() as bridge:
            assert rows(bridge) == 2
            failed = len(failures.read_bytes())
        run.next_generation()
        run.agree()
        with run.bridge() as bridge:
            assert rows(bridge) == 2
            assert len(failures.read_bytes()) == failed, "what one generation learnt, the next need not"
            for _ in range(50):
                assert rows(bridge) == 2
            assert failed < len(failures.read_bytes()) < failed + 6, "it is tried again, and more and more rarely"
            freed.touch()
            until(lambda: rows(bridge) == 8)


def test_a_generation_may_have_more_ranks_than_the_last():
    with Run(2, 1, "train.restarts=2") as run:
        for lanes in (2, 3, 1):
            if lanes != 2:
                run.next_generation(lanes)
                run.agree()
            bridges = [run.bridge(lane) for lane in range(lanes)]
            for bridge in bridges:
                check(bridge.exchange(ids(0)), 0)
            try:
                run.bridge(lanes)
            except AttachError as error:
                assert f"the session has lanes 0 to {lanes - 1}" in str(error)
            else:
                raise AssertionError("there is no such lane")
            for bridge in bridges:
                bridge.close()


def test_a_teacher_skips_the_generations_that_end_while_it_loads(tmp_path):
    """One that it finds, and one that begins and ends meanwhile; the process that has loaded then serves the next one."""
    gate = tmp_path / "loaded"

    class Slow(Doubling):
        def __call__(self, batch):
            until(gate.exists)
            return super().__call__(batch)

    with Run(1, 1, "train.restarts=9", forward=Slow(), ready=False) as run:
        record = run.owner.control.teachers[0]
        until(lambda: record.identity)
        run.next_generation()
        run.owner.end_training()
        gate.touch()
        until(lambda: record.phase is Phase.IDLE, "a teacher that waits for a generation")
        assert record.ready == 0
        run.token = run.owner.start_generation()
        run.agree()
        with run.bridge() as bridge:
            check(bridge.exchange(ids(0)), 0)
        assert run.first.poll() is None


def test_a_failure_ends_the_wait_for_a_new_teacher():
    with Run() as run:

        def train(bridge: Bridge) -> None:
            bridge.exchange(ids(0))
            os.kill(run.first.pid, signal.SIGKILL)
            try:
                bridge.exchange(ids(1))
            except PeerLost as error:
                assert "no more" in str(error)
            else:
                raise AssertionError("nobody can have answered")

        rank = run.rank(0, train)
        until(lambda: run.first.poll() is not None)
        run.owner.fail(Failure("teacher", 0, 1, "forward", None, None, "no more"))
        assert rank.join() == 0


def doorbells(pid: int) -> int:
    """How many semaphores a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("/dev/shm/sem.")
