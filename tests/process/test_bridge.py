"""The request path with real processes: hand-over, split, leases, shapes, order, close."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shmbridge.errors import Closed, DeadlineExceeded, RequestRefused, RingFull, TeacherDied, TeacherError
from shmbridge.shm import process
from shmbridge.shm.record import Phase
from shmbridge.teacher.batch import Batch
from tests.harness import Echo, bench, until


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
    model = tiny_model()
    with bench() as it:
        it.teacher(logits_of(model))
        bridge = it.bridge()
        sent = ids(3, 17)
        with bridge.submit(sent).wait() as reply, torch.inference_mode():
            assert reply.logits.dtype == torch.float32
            assert torch.equal(reply.logits, model(input_ids=sent).logits)
        bridge.close()


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_views_are_taken_as_they_are(dtype):
    with bench() as it:
        it.teacher(Echo())
        bridge = it.bridge()
        batch = torch.arange(2 * 6 * 2, dtype=dtype).reshape(2, 6, 2)
        assert torch.equal(bridge.exchange(batch[:, :, 0])["ids"], batch[:, :, 0].long())
        assert torch.equal(bridge.exchange(batch.numpy()[:, :, 1])["ids"], batch[:, :, 1].long())
        bridge.close()


def test_attention_mask_reaches_the_teacher():
    with bench() as it:
        it.teacher(Echo())
        bridge = it.bridge()
        mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
        for given in (mask, mask.bool(), mask.numpy().astype(np.uint8)):
            assert torch.equal(bridge.exchange(ids(2, 3), given)["mask"], mask)
        bridge.close()


@pytest.mark.every_plane
def test_several_in_flight_come_back_to_their_own_pending_and_leases_end_in_any_order():
    with bench(1, "ring.depth=3") as it:
        it.teacher(Echo())
        bridge = it.bridge()
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
        bridge.close()


@pytest.mark.every_plane
def test_a_slot_is_not_reused_while_an_older_lease_is_held():
    with bench(1, "ring.depth=2") as it:
        it.teacher(Echo())
        bridge = it.bridge()
        first, second = bridge.submit(ids(1, 4, 1)), bridge.submit(ids(1, 4, 2))
        with first.wait() as held:
            second.wait().release()
            with pytest.raises(RingFull):
                bridge.submit(ids(1, 4, 3))
            assert torch.equal(held["ids"], ids(1, 4, 1))
        bridge.exchange(ids(1, 4, 3))
        bridge.close()


def test_a_slot_first_read_in_an_evaluation_serves_training_later():
    with bench(1, "ring.depth=1") as it:
        it.teacher(lambda batch: {"x": batch.input_ids.float()})
        bridge = it.bridge()
        with torch.inference_mode():
            bridge.exchange(ids(1, 4))
        weight = torch.ones(4, requires_grad=True)
        with bridge.submit(ids(1, 4)).wait() as reply:
            (reply["x"] * weight).sum().backward()
        assert torch.equal(weight.grad, ids(1, 4)[0].float())
        bridge.close()


def test_exchange_owns_its_tensors():
    with bench(1, "ring.depth=1") as it:
        it.teacher(Echo())
        bridge = it.bridge()
        first = bridge.exchange(ids(2, 6, 1))
        bridge.exchange(ids(2, 6, 2))
        assert torch.equal(first["ids"], ids(2, 6, 1))
        bridge.close()


def test_a_released_reply_refuses_to_be_read():
    with bench() as it:
        it.teacher(Echo())
        bridge = it.bridge()
        pending = bridge.submit(ids(1, 2))
        with pending.wait() as reply:
            pass
        with pytest.raises(Closed, match="released"):
            reply["ids"]
        with pytest.raises(Closed, match="leased once"):
            pending.wait()
        bridge.close()
        with pytest.raises(Closed, match="bridge is closed"):
            bridge.submit(ids(1, 2))


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


def test_a_row_that_never_fits_is_told_to_its_rank():
    def forward(given: Batch) -> dict[str, torch.Tensor]:
        if given.input_ids.shape[1] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ids": given.input_ids.clone()}

    with bench() as it:
        it.teacher(forward)
        bridge = it.bridge()
        with pytest.raises(TeacherError, match="out of memory"):
            bridge.exchange(ids(2, 13))
        assert torch.equal(bridge.exchange(ids(2, 12))["ids"], ids(2, 12)), "the slot is free and the teacher lives"
        bridge.close()


def test_a_retry_after_out_of_memory_finds_the_failed_forwards_memory_free():
    alive: list[weakref.ref] = []

    class Activation:
        pass

    def forward(given: Batch) -> dict[str, torch.Tensor]:
        activation = Activation()
        assert not [one for one in alive if one()], "the failed forward's activations are still alive"
        alive.append(weakref.ref(activation))
        if len(given.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ids": given.input_ids.clone()}

    with bench() as it:
        it.teacher(forward)
        bridge = it.bridge()
        assert torch.equal(bridge.exchange(ids(7, 3))["ids"], ids(7, 3))
        bridge.close()


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
            lambda: record.phase is Phase.CLOSED or record.seconds_in_phase > 1, "a teacher that collects, or has ended"
        )
        for step in range(5):
            bridge.exchange(ids(1, 3), step=step)

    with bench(2, "teacher.linger_ms=300") as it:
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


def test_a_dropped_pending_gives_its_slot_back():
    with bench(1, "ring.depth=2") as it:
        it.teacher(Echo())
        bridge = it.bridge()
        for step in range(20):
            bridge.submit(ids(1, 3), step=step)
            until(lambda: it.owner.lanes[0].ring.replied == it.owner.lanes[0].ring.requested, "the reply")
        assert torch.equal(bridge.exchange(ids(1, 3, 5))["ids"], ids(1, 3, 5))
        bridge.close()


def test_rings_that_nobody_slept_for_do_not_pile_up():
    with bench() as it:
        it.teacher(Echo())
        bridge = it.bridge()
        for step in range(50):
            pending = bridge.submit(ids(1, 3), step=step)
            until(lambda pending=pending: pending.done, "the reply")
            pending.copy()
        assert bridge._life.session.bell._semaphore.value <= 1
        bridge.close()


def test_max_batch_tokens_bounds_every_forward_and_splits_by_rows():
    with bench(1, "teacher.max_batch_tokens=20") as it:
        it.teacher(Echo())
        bridge = it.bridge()
        sent = ids(7, 8)
        reply = bridge.exchange(sent)
        assert torch.equal(reply["ids"], sent)
        assert set(map(tuple, reply["shape"].tolist())) == {(2, 8), (1, 8)}
        bridge.close()


@pytest.mark.promise(17)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[5, 1000]]), r"input_ids\[0, 1\] is 1000; the teacher .* takes 0 to 999"),
        (torch.tensor([[5, -100]]), r"input_ids\[0, 1\] is -100"),
        (torch.tensor([[5, -100]], dtype=torch.int32), r"is -100"),
        (torch.ones(1, 3), "dtype float32; expected int32 or int64"),
        (torch.ones(3, dtype=torch.int64), r"shape \(3,\); expected \(batch, seq\)"),
        (torch.ones(0, 3, dtype=torch.int64), "empty"),
        (torch.ones(1, 257, dtype=torch.int64), r"Raise ring\.max_tokens"),
        (torch.ones(1, 3, dtype=torch.int64, device="meta"), "is on meta; expected a tensor on the CPU"),
        ([[1, 2]], "is a list; expected a torch.Tensor"),
        (torch.ones(1, 3, dtype=torch.bfloat16), "input_ids is a tensor of torch.bfloat16"),
        (torch.eye(3, dtype=torch.int64).to_sparse(), "input_ids is a tensor of torch.int64, torch.sparse_coo"),
    ],
)
def test_bad_ids_are_refused_in_the_rank_that_sent_them(bad, message, promise):
    with bench() as it:
        it.teacher(Echo())
        bridge = it.bridge()
        began = time.monotonic()
        with pytest.raises(RequestRefused, match=message) as caught:
            bridge.submit(bad)
        took_s = time.monotonic() - began
        assert isinstance(caught.value, ValueError)
        assert it.owner.lanes[0].ring.requested == 0, "nothing reached the teacher"
        assert torch.equal(bridge.exchange(ids(1, 3))["ids"], ids(1, 3)), "the bridge goes on"
        bridge.close()
    promise.kept("a ValueError in its rank; nothing reached the teacher", took_s)


def test_too_many_rows_or_positions_are_refused():
    forward = Echo()
    forward.max_seq = 16
    with bench(1, "ring.max_batch=4") as it:
        it.teacher(forward)
        bridge = it.bridge()
        with pytest.raises(RequestRefused, match=r"5 rows.*ring\.max_batch"):
            bridge.submit(ids(5, 2))
        with pytest.raises(
            RequestRefused, match=r"17 tokens long; the teacher '.*' has 16 positions\. Truncate to 16 tokens, or"
        ):
            bridge.submit(ids(1, 17))
        with pytest.raises(RequestRefused, match="attention_mask has shape"):
            bridge.submit(ids(1, 4), torch.ones(1, 5))
        with pytest.raises(RequestRefused, match="other than 0 and 1"):
            bridge.submit(ids(1, 4), torch.full((1, 4), 0.5))
        bridge.close()


def test_deadline_names_the_request_and_wait_may_be_called_again():
    read, write = os.pipe()

    class Gate(Echo):
        rounds = 0

        def __call__(self, batch):
            self.rounds += 1
            if self.rounds > 2:  # after the two probe batches
                os.read(read, 1)
            return super().__call__(batch)

    with bench() as it:
        it.teacher(Gate())
        bridge = it.bridge()
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
        bridge.close()


def test_what_a_signal_handler_raises_ends_the_wait():
    """A SIGTERM handler that calls sys.exit, in the middle of the project's one blocking wait."""

    class Slow(Echo):
        rounds = 0

        def __call__(self, batch):
            self.rounds += 1
            if self.rounds > 2:
                until(lambda: process.state(rank.pid) == "sleeping", "the rank asleep")
                os.kill(rank.pid, signal.SIGTERM)
                until(lambda: process.state(rank.pid) in ("zombie", "gone"), "the rank's end")
            return super().__call__(batch)

    def body(bridge):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        try:
            bridge.exchange(ids(1, 4))
        except SystemExit as ended:
            os._exit(ended.code)

    with bench() as it:
        go, gone = os.pipe()
        rank = it.start(lambda: (os.read(go, 1), it._train(0, body)))
        slow = Slow()
        it.teacher(slow)
        os.write(gone, b"x")
        assert rank.join() == 7


def test_a_forked_child_cannot_use_or_close_the_bridge():
    with bench() as it:
        it.teacher(Echo())
        bridge = it.bridge()
        bridge.wait_ready()

        def child() -> None:
            with pytest.raises(Closed, match="forked child"):
                bridge.submit(ids(1, 2))
            bridge.close()

        assert it.start(child).join() == 0
        assert torch.equal(bridge.exchange(ids(1, 3))["ids"], ids(1, 3))
        bridge.close()


@pytest.mark.every_plane
def test_replies_with_and_without_a_sequence_axis_in_every_dtype():
    from shmbridge.plane.tensors import DTYPES

    def forward(batch: Batch) -> dict[str, torch.Tensor]:
        base = batch.input_ids
        outputs = {name: (base % 2).to(dtype) for name, dtype in DTYPES.items() if name in ("bfloat16", "bool", "int8")}
        return {**outputs, "pooled": base.double().mean(1), "table": base[:, :1, None].expand(-1, 2, 3).float()}

    with bench() as it:
        it.teacher(forward)
        bridge = it.bridge()
        sent = ids(3, 5)
        reply = bridge.exchange(sent)
        for name in ("bfloat16", "bool", "int8"):
            assert torch.equal(reply[name], (sent % 2).to(DTYPES[name]))
        assert torch.equal(reply["pooled"], sent.double().mean(1))
        assert torch.equal(reply["table"], sent[:, :1, None].expand(-1, 2, 3).float())
        with pytest.raises(KeyError, match="no 'logits'; it has bfloat16"):
            reply.logits  # noqa: B018
        bridge.close()
