"""The request path with real processes: hand-over, split, leases, shapes, order, close."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shmbridge.errors import Closed, DeadlineExceeded, RequestRefused, RingFull, TeacherDied, TeacherError
from shmbridge.plane.tensors import DTYPES
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.participant_record import Phase
from shmbridge.teacher.batch import Batch
from tests.harness import Bench, Echo, bench, until


@contextmanager
def running(*overrides: str, teacher: Any = None, lanes: int = 1) -> Iterator[tuple[Bench, Bridge]]:
    """A teacher and this process's bridge, closed in the end; the teacher must end well."""
    with bench(lanes, *overrides) as it:
        child = it.teacher(teacher or Echo())
        bridge = it.bridge()
        yield it, bridge
        bridge.close()
        assert child.join() == 0


def ids(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1000, (batch, seq), generator=torch.Generator().manual_seed(seed))


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(shape).eval()


def logits_of(model: LlamaForCausalLM):
    def forward(batch: Batch) -> dict[str, torch.Tensor]:
        return {"logits": model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits}

    return forward


@pytest.mark.every_plane
def test_reply_is_bit_identical_to_the_model_in_one_process():
    model, sent = tiny_model(), ids(3, 17)
    with (
        running(teacher=logits_of(model)) as (_, bridge),
        bridge.submit(sent).wait() as reply,
        torch.inference_mode(),
    ):
        assert reply.logits.dtype == torch.float32
        assert torch.equal(reply.logits, model(input_ids=sent).logits)


def test_a_combined_padded_forward_is_bit_identical_for_the_same_composition():
    """Two ranks of different lengths in one lockstep forward; each rebuilds the whole batch and compares its rows."""
    model = tiny_model()
    sent = [ids(2, 9, seed=1), ids(3, 14, seed=2)]
    combined = torch.zeros(5, 14, dtype=torch.int64)
    mask = torch.zeros(5, 14, dtype=torch.int64)
    combined[:2, :9], combined[2:] = sent
    mask[:2, :9] = mask[2:] = 1

    def rank(lane: int):
        def body(bridge):
            torch.set_num_threads(1)
            with bridge.submit(sent[lane]).wait() as reply, torch.inference_mode():
                want = model(input_ids=combined, attention_mask=mask).logits
                at = reply.composition
                assert (at.rows, at.padded_seq) == (5, 14)
                seq = sent[lane].shape[1]
                assert torch.equal(reply.logits, want[at.row : at.row + len(sent[lane]), :seq])

        return body

    with bench(2, "teacher.collect=lockstep") as it:
        it.teacher(logits_of(model))
        assert [child.join() for child in [it.rank(lane, rank(lane)) for lane in range(2)]] == [0, 0]


@pytest.mark.promise(22)
def test_ranks_with_different_shapes_and_numbers_of_batches(promise):
    def rank(lane: int):
        def body(bridge):
            for step in range(5 + 10 * lane):
                sent = ids(1 + (step + lane) % 3, 4 + lane + step % 5, seed=100 * lane + step)
                reply = bridge.exchange(sent, step=step)
                assert torch.equal(reply["ids"], sent)
                assert bool(reply["mask"].all())

        return body

    with bench(3) as it:
        teacher = it.teacher(Echo())
        assert [child.join() for child in [it.rank(lane, rank(lane)) for lane in range(3)]] == [0, 0, 0]
        assert teacher.join() == 0, "the teacher ends when the last rank has closed"
    promise.kept("ranks of 5, 15 and 25 batches: nobody hung")


@pytest.mark.every_plane
def test_several_in_flight_come_back_to_their_own_pending_and_leases_end_in_any_order():
    with running("ring.depth=3") as (_, bridge):
        for turn in range(4):
            sent = [ids(1, 5, seed=10 * turn + i) for i in range(3)]
            pending = [bridge.submit(batch) for batch in sent]
            with pytest.raises(RingFull, match=r"ring\.depth=3"):
                bridge.submit(ids(1, 5))
            leases = [pending[i].wait() for i in (2, 0, 1)]
            for i, lease in zip((2, 0, 1), leases, strict=True):
                assert torch.equal(lease.reply["ids"], sent[i])
            for lease in (leases[2], leases[0], leases[1]):
                lease.release()


@pytest.mark.every_plane
def test_no_reference_cycle_holds_a_lease_or_a_mapping():
    """With the collector off, dropping the bridge unmaps every segment of the session."""

    def body() -> None:
        gc.disable()
        bridge = it.bridge()
        for step in range(3):
            pending = bridge.submit(ids(1, 4), step=step)
            with pending.wait() as reply:
                reply["ids"].sum()
        watched = [weakref.ref(bridge)]
        bridge.close()
        del bridge, pending, reply
        assert watched[0]() is None
        with open("/proc/self/maps") as maps:
            mapped = [line for line in maps if it.owner.session_id in line and ("lane" in line or "reply" in line)]
        inherited = [line for line in mapped if "lane" in line]
        assert len(inherited) <= 1, inherited  # the test's own owner mapped the lane before the fork
        assert not [line for line in mapped if "reply" in line]

    with bench() as it:
        it.teacher(Echo())
        assert it.start(body).join() == 0


@pytest.mark.promise(16)
def test_forward_that_raises_fails_only_the_culprit(promise):
    def forward(batch: Batch) -> dict[str, torch.Tensor]:
        if (batch.input_ids == 666).any():
            raise ArithmeticError("six hundred and sixty-six")
        return {"ids": batch.input_ids}

    def body(bridge):
        lane = bridge.rank
        for step in range(4):
            bad = lane == 1 and step == 2
            sent = torch.full((2, 3), 666 if bad else 10 * lane + step)
            if bad:
                with pytest.raises(TeacherError, match="six hundred and sixty-six") as caught:
                    bridge.exchange(sent, step=step)
                assert "in forward" in caught.value.remote_traceback
            else:
                assert torch.equal(bridge.exchange(sent, step=step)["ids"], sent)

    with bench(2, "teacher.collect=lockstep") as it:
        it.teacher(forward)
        assert [child.join() for child in [it.rank(lane, body) for lane in range(2)]] == [0, 0]
    promise.kept("the bad batch's rank got the teacher's traceback; all went on")


@pytest.mark.promise(16)
@pytest.mark.parametrize(("ranks", "batch", "rows"), [(2, 5, 3), (3, 2, 2), (3, 4, 4), (1, 7, 1)])
def test_out_of_memory_halves_the_batch_and_every_rank_gets_its_own_rows(ranks, batch, rows, promise):
    def forward(given: Batch) -> dict[str, torch.Tensor]:
        if len(given.input_ids) > rows and given.input_ids.shape[1] == 5:  # not in the probe
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return {"ids": given.input_ids.clone()}

    def body(bridge):
        for step in range(3):
            sent = ids(batch, 5, seed=10 * step + bridge.rank)
            assert torch.equal(bridge.exchange(sent)["ids"], sent)

    with bench(ranks, "teacher.collect=lockstep") as it:
        it.teacher(forward)
        assert [child.join() for child in [it.rank(lane, body) for lane in range(ranks)]] == [0] * ranks
    promise.kept("out of memory: halved until it fitted, right answers")


def test_out_of_memory_frees_the_failed_forward_and_a_row_that_never_fits_is_told_to_its_rank():
    alive: list[weakref.ref] = []

    class Activation:
        pass

    def forward(given: Batch) -> dict[str, torch.Tensor]:
        activation = Activation()
        assert not [each for each in alive if each()], "the failed forward's activations are still alive"
        alive.append(weakref.ref(activation))
        if len(given.input_ids) > 2 or given.input_ids.shape[1] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ids": given.input_ids.clone()}

    with running(teacher=forward) as (_, bridge):
        assert torch.equal(bridge.exchange(ids(7, 3))["ids"], ids(7, 3))
        with pytest.raises(TeacherError, match="out of memory"):
            bridge.exchange(ids(2, 13))
        assert torch.equal(bridge.exchange(ids(2, 12))["ids"], ids(2, 12)), "the slot is free and the teacher lives"


def test_a_rank_that_asks_once_too_often_and_leaves_does_not_end_the_teacher():
    """It submits, closes and exits while the teacher is busy with the other rank: nobody reads its last reply."""
    gone, tell = os.pipe()

    class Busy(Echo):
        def __call__(self, batch):
            if (batch.input_ids == 7).any():
                os.read(gone, 1)  # until the other rank has left
            return super().__call__(batch)

    def leaver(bridge):
        bridge.wait_ready()
        until(lambda: it.owner.control.teachers[0].phase is Phase.FORWARD, "a busy teacher")
        bridge.submit(ids(1, 3))

    def stayer(bridge):
        bridge.exchange(torch.full((1, 3), 7))
        record = it.owner.control.teachers[0]  # longer than the linger, in which the teacher misses the leaver
        until(
            lambda: record.phase is Phase.CLOSED or record.seconds_in_phase > 0.3,
            "a teacher that collects, or has ended",
        )
        for step in range(5):
            bridge.exchange(ids(1, 3), step=step)

    with bench(2, "teacher.linger_ms=100") as it:
        teacher = it.teacher(Busy())
        children = [it.rank(0, leaver), it.rank(1, stayer)]
        assert children[0].join() == 0
        os.write(tell, b"x")
        assert children[1].join() == 0
        assert teacher.join() == 0


def test_a_teacher_answers_what_was_submitted_before_training_ended():
    with bench(1, "ring.depth=2") as it:
        teacher = it.teacher(Ending(it.owner))
        bridge = it.bridge()
        pending = [bridge.submit(ids(1, 3)), bridge.submit(ids(1, 3))]
        for one in pending:
            assert torch.equal(one.copy()["ids"], ids(1, 3))
        assert teacher.join() == 0
        with pytest.raises(TeacherDied, match="is gone; it was in phase closed"):
            bridge.exchange(ids(1, 3))
        bridge.close()


class Ending(Echo):
    """Ends the training, in its first forward and once two requests were submitted."""

    def __init__(self, owner) -> None:
        self.owner = owner
        self.rounds = 0

    def __call__(self, batch):
        self.rounds += 1
        if self.rounds == 3:
            until(lambda: self.owner.lanes[0].ring.requested == 2, "the second request")
            self.owner.end_training()
        return super().__call__(batch)


def test_max_batch_tokens_bounds_every_forward_and_splits_by_rows():
    sent = ids(7, 8)
    with running("teacher.max_batch_tokens=20") as (_, bridge):
        reply = bridge.exchange(sent)
        assert torch.equal(reply["ids"], sent)
        assert set(map(tuple, reply["shape"].tolist())) == {(2, 8), (1, 8)}


BAD_IDS = [
    (torch.tensor([[5, 1000]]), r"input_ids\[0, 1\] is 1000; the teacher .* takes 0 to 999"),
    (torch.tensor([[5, -100]]), r"input_ids\[0, 1\] is -100"),
    (torch.tensor([[5, -100]], dtype=torch.int32), r"is -100"),
    (torch.ones(1, 3), "dtype float32; expected int32 or int64"),
    (torch.ones(3, dtype=torch.int64), r"shape \(3,\); expected \(batch, seq\)"),
    (torch.ones(0, 3, dtype=torch.int64), "empty"),
    (torch.ones(1, 257, dtype=torch.int64), r"Raise ring\.max_tokens"),
    (torch.ones(5, 2, dtype=torch.int64), r"5 rows.*ring\.max_batch"),
    (
        torch.ones(1, 17, dtype=torch.int64),
        r"17 tokens long; the teacher '.*' has 16 positions\. Truncate to 16 tokens",
    ),
    (torch.ones(1, 3, dtype=torch.int64, device="meta"), "is on meta; expected a tensor on the CPU"),
    ([[1, 2]], "is a list; expected a torch.Tensor"),
    (torch.ones(1, 3, dtype=torch.bfloat16), "input_ids is a tensor of torch.bfloat16"),
    (torch.eye(3, dtype=torch.int64).to_sparse(), "input_ids is a tensor of torch.int64, torch.sparse_coo"),
]


@pytest.mark.one_plane
@pytest.mark.promise(17)
def test_bad_ids_are_refused_in_the_rank_that_sent_them(promise):
    teacher, took_s = Echo(), 0.0
    teacher.max_seq = 16
    with running("ring.max_batch=4", teacher=teacher) as (it, bridge):
        bridge.wait_ready()
        for bad, message in BAD_IDS:
            began = time.monotonic()
            with pytest.raises(RequestRefused, match=message) as caught:
                bridge.submit(bad)
            took_s = max(took_s, time.monotonic() - began)
            assert isinstance(caught.value, ValueError)
        assert it.owner.lanes[0].ring.requested == 0, "nothing reached the teacher"
        assert torch.equal(bridge.exchange(ids(1, 3))["ids"], ids(1, 3)), "the bridge goes on"
    promise.kept("a ValueError in its rank; nothing reached the teacher", took_s)


def test_what_is_over_or_of_another_process_is_told():
    def forked() -> None:
        with pytest.raises(Closed, match="forked child"):
            bridge.submit(ids(1, 2))
        bridge.close()

    with running() as (it, bridge):
        pending = bridge.submit(ids(1, 2))
        assert it.start(forked).join() == 0
        with pending.wait() as reply:
            pass
        with pytest.raises(Closed, match="released"):
            reply["ids"]
        with pytest.raises(Closed, match="leased once"):
            pending.wait()
        bridge.close()
        with pytest.raises(Closed, match="bridge is closed"):
            bridge.submit(ids(1, 2))


def test_what_nobody_waits_for_does_not_pile_up():
    """Neither slots of dropped requests, nor rings that nobody slept for."""
    with running() as (it, bridge):
        ring = it.owner.lanes[0].ring
        for step in range(50):
            pending = bridge.submit(ids(1, 3), step=step)
            until(lambda: ring.replied == ring.requested, "the reply")
            if step % 2:
                pending.copy()
        assert bridge._life.session.bell._semaphore.value <= 1
        assert torch.equal(bridge.exchange(ids(1, 3, 5))["ids"], ids(1, 3, 5))


def test_deadline_names_the_request_and_wait_may_be_called_again():
    read, write = os.pipe()

    class Gate(Echo):
        rounds = 0

        def __call__(self, batch):
            self.rounds += 1
            if self.rounds > 2:  # after the two probe batches
                os.read(read, 1)
            return super().__call__(batch)

    with running(teacher=Gate()) as (it, bridge):
        pending = bridge.submit(ids(1, 4), step=7)
        assert not pending.done
        with pytest.raises(
            DeadlineExceeded, match=r"step 7, sequence 0 after 0\.05 s; the teacher is in phase forward"
        ):
            pending.wait(timeout=0.05)
        assert it.owner.lanes[0].records[0].phase is Phase.TRAINING  # for the board, and so for hang reports
        os.write(write, b"x")
        with pending.wait() as reply:
            assert torch.equal(reply["ids"], ids(1, 4))


@pytest.mark.every_plane
def test_replies_with_and_without_a_sequence_axis_in_every_dtype():
    def forward(batch: Batch) -> dict[str, torch.Tensor]:
        base = batch.input_ids
        outputs = {name: (base % 2).to(dtype) for name, dtype in DTYPES.items() if name in ("bfloat16", "bool", "int8")}
        return {**outputs, "pooled": base.double().mean(1), "table": base[:, :1, None].expand(-1, 2, 3).float()}

    sent = ids(3, 5)
    with running(teacher=forward) as (_, bridge):
        reply = bridge.exchange(sent)
        for name in ("bfloat16", "bool", "int8"):
            assert torch.equal(reply[name], (sent % 2).to(DTYPES[name]))
        assert torch.equal(reply["pooled"], sent.double().mean(1))
        assert torch.equal(reply["table"], sent[:, :1, None].expand(-1, 2, 3).float())
        with pytest.raises(KeyError, match="no 'logits'; it has bfloat16"):
            reply.logits  # noqa: B018
