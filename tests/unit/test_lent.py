"""Lent tensors: autograd refuses a backward that comes after the lease, and nothing else is refused; dropped leases end."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from shmbridge import connect
from shmbridge.errors import Closed, RingFull
from shmbridge.losses import forward_kl, generalized_jsd, reverse_kl
from shmbridge.rank.bridge import Bridge, Lease, Reply
from tests import harness
from tests.fake_cuda import FakeCuda

LENDS = {"host": [], "cuda in place": ["plane=cuda_ipc", "cuda.read=in_place"]}
WHOLE, CHUNKS = [], ["payload.stream={chunk_positions: 2, chunks: 2}"]
IDS = torch.arange(6).view(1, 6)
VOCAB = 5
TOO_LATE = "modified by an inplace operation"


def logits(batch) -> dict[str, torch.Tensor]:
    """(batch, seq, VOCAB), each position another."""
    return {"logits": torch.sin(batch.input_ids.unsqueeze(-1) * (1 + torch.arange(VOCAB)))}


@pytest.fixture
def bridge(request, monkeypatch) -> Iterator[Bridge]:
    """With two slots, or two chunks."""
    FakeCuda().install(monkeypatch)
    with harness.bench(1, "ring.depth=2", *request.param) as it:
        it.teacher(logits)
        with it.bridge() as bridge:
            yield bridge


def over(*ways: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bridge", ways, indirect=True, ids=lambda way: way[0] if way else "host")


EVERY_PLANE_THAT_LENDS = over(*LENDS.values())
EVERY_WAY_TO_LEND = over(*(plane + shape for plane in LENDS.values() for shape in (WHOLE, CHUNKS)))

Use = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


SAVED: dict[str, Use] = {
    "as it is": lambda student, lent: student * lent,
    "a view": lambda student, lent: student[..., ::2] * lent[..., ::2],
    "float() of a float32": lambda student, lent: student * lent.float(),
    "detach()": lambda student, lent: student * lent.detach(),
    "a function of our own": Product.apply,
    "a checkpointed function": lambda student, lent: checkpoint(torch.mul, student, lent, use_reentrant=False),
}
NOT_SAVED: dict[str, Use] = {
    "a sum": lambda student, lent: student + lent,
    "a function of it": lambda student, lent: student * lent.exp(),
    "forward_kl": lambda student, lent: forward_kl(student, lent),
    "reverse_kl": lambda student, lent: reverse_kl(student, lent),
    "generalized_jsd": lambda student, lent: generalized_jsd(student, lent),
}


def a_student() -> torch.Tensor:
    return torch.cos(torch.arange(6.0 * VOCAB)).view(6, VOCAB).requires_grad_()


def gradient(bridge: Bridge, use: Use, late: bool) -> torch.Tensor:
    """The student's gradient (6, VOCAB) by the sum of `use` over a reply; `late`: the backward follows after its lease, or
    after its chunks."""
    student, losses = a_student(), []
    for rows, chunk in bridge.submit(IDS).chunks():
        losses.append(use(student[rows], chunk["logits"]).sum())
        if not late:
            losses.pop().backward()
    for loss in losses:
        loss.backward()
    return student.grad


def expected(use: Use) -> torch.Tensor:
    student, teacher = a_student(), logits(type("Batch", (), {"input_ids": IDS}))["logits"].flatten(0, 1)
    use(student, teacher).sum().backward()
    return student.grad


@EVERY_WAY_TO_LEND
def test_a_backward_that_needs_a_lent_tensor_raises_after_the_lease_and_is_right_within(bridge):
    for what, use in SAVED.items():
        for _ in range(3):  # in a slot that was lent before as well
            assert torch.equal(gradient(bridge, use, late=False), expected(use)), what
            with pytest.raises(RuntimeError, match=TOO_LATE):
                gradient(bridge, use, late=True)


@EVERY_WAY_TO_LEND
def test_a_graph_that_has_saved_nothing_of_it_may_be_run_after_the_lease(bridge):
    for what, use in NOT_SAVED.items():
        for late in (False, True):
            found = gradient(bridge, use, late)
            if "kl" in what or "jsd" in what:  # a mean, here over each chunk
                assert found.isfinite().all() and found.any(), what
            else:
                assert torch.equal(found, expected(use)), what


@EVERY_PLANE_THAT_LENDS
def test_our_losses_have_their_gradient_when_the_lease_ends(bridge):
    for loss in (forward_kl, reverse_kl, generalized_jsd):
        student = a_student()
        with bridge.submit(IDS).wait() as reply:
            late = loss(student.view(1, 6, VOCAB), reply.logits)
        bridge.exchange(IDS + 1), bridge.exchange(IDS + 1)  # both slots are written again
        late.backward()
        assert torch.equal(student.grad, expected(loss))


@EVERY_PLANE_THAT_LENDS
def test_variables_that_outlive_the_block_are_nobodys_business(bridge, caplog):
    kept = []
    for _ in range(3):
        with bridge.submit(IDS).wait() as reply:
            kept += [reply, reply.logits, reply.logits[0], (a_student() * reply.logits).sum()]
    assert not caplog.records
    with pytest.raises(Closed, match="use the reply inside its `with` block"):
        reply.logits  # noqa: B018


@EVERY_PLANE_THAT_LENDS
def test_two_leases_at_once_end_each_for_itself(bridge):
    student = a_student()
    first, second = bridge.submit(IDS), bridge.submit(IDS)
    with first.wait() as reply:
        with second.wait():
            loss = (student * reply.logits).sum()
        loss.backward()
    assert torch.equal(student.grad, expected(torch.mul))


@EVERY_PLANE_THAT_LENDS
def test_under_inference_mode_and_no_grad_too(bridge):
    for mode in (torch.inference_mode, torch.no_grad):
        student = a_student()
        with mode():
            lease = bridge.submit(IDS).wait()
        loss = (student * lease.reply.logits).sum()
        loss.backward(retain_graph=True)
        with mode():
            lease.release()
        with pytest.raises(RuntimeError, match=TOO_LATE):
            loss.backward()


@over(["plane=cuda_ipc", "cuda.read=copy"])
def test_copies_are_the_ranks_own(bridge):
    for use in SAVED.values():
        assert torch.equal(gradient(bridge, use, late=True), expected(use))


@EVERY_WAY_TO_LEND
def test_what_copy_and_owned_give_is_the_ranks_own(bridge):
    student, copy = a_student(), bridge.submit(IDS).copy()
    owned = [chunk.owned()["logits"] for _, chunk in bridge.submit(IDS).chunks()]
    for _ in range(3):
        bridge.exchange(IDS + 1)
    (student * torch.cat(owned)).sum().backward()
    assert torch.equal(student.grad, expected(torch.mul))
    assert torch.equal(copy.logits.flatten(0, 1), torch.cat(owned))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's own, within its compiler
@over(WHOLE)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_a_compiled_function_too(bridge, backend):
    use = torch.compile(lambda student, lent: (student.exp() * lent).sum(-1), backend=backend)
    assert torch.allclose(gradient(bridge, use, late=False), expected(use))
    with pytest.raises(RuntimeError, match=TOO_LATE):
        gradient(bridge, use, late=True)


# What the error says


@EVERY_WAY_TO_LEND
def test_the_error_that_leaves_the_bridges_block_tells_sequence_and_remedy(bridge):
    for _ in range(5):
        bridge.exchange(IDS)
    student, losses = a_student(), {}
    for step in (70, 71, 72):
        for rows, chunk in bridge.submit(IDS, step=step).chunks():
            losses[step] = (student[rows] * chunk["logits"]).sum()
    with pytest.raises(RuntimeError, match=TOO_LATE) as raised, bridge:
        losses[71].backward()
    (note,) = raised.value.__notes__
    assert "step 71, sequence 6" in note
    assert "pending.copy()" in note


@over(WHOLE)
def test_an_in_place_operation_of_the_scripts_own_gets_no_note(bridge):
    with bridge.submit(IDS).wait() as reply:
        scale = a_student()
        loss = (scale * (product := scale.detach() * reply.logits)).sum()
    product.zero_()
    with pytest.raises(RuntimeError, match=TOO_LATE) as raised, bridge:
        loss.backward()
    assert not hasattr(raised.value, "__notes__")


def test_so_does_one_that_nobody_catches(monkeypatch):
    """sys.excepthook, which connect() has set, explains it."""

    def train() -> None:
        bridge = connect()
        with bridge.submit(IDS).wait() as reply:
            loss = (a_student() * reply.logits).sum()
        with pytest.raises(RuntimeError, match=TOO_LATE) as raised:
            loss.backward()
        sys.excepthook(raised.type, raised.value, raised.tb)
        assert "This backward needs the reply to step None, sequence 0" in raised.value.__notes__[0]

    with harness.bench() as it:
        it.teacher(logits)
        monkeypatch.setenv("SHMBRIDGE_SESSION", str(it.token))
        assert it.start(train).join() == 0


# Leases without a block


@EVERY_PLANE_THAT_LENDS
def test_a_dropped_lease_gives_its_slot_back(bridge):
    gc.disable()
    try:
        for turn in range(6):
            loss = (a_student() * bridge.submit(IDS + turn).wait().reply.logits).sum()
            assert bridge.free_slots == 2
            with pytest.raises(RuntimeError, match=TOO_LATE):
                loss.backward()
    finally:
        gc.enable()


@EVERY_PLANE_THAT_LENDS
def test_a_reply_whose_lease_was_dropped_keeps_its_slot(bridge):
    reply = bridge.submit(IDS).wait().reply
    kept = reply.logits.clone()
    bridge.exchange(IDS + 1)
    with pytest.raises(RingFull):
        bridge.exchange(IDS + 2)
    assert torch.equal(reply.logits, kept)
    del reply
    assert bridge.free_slots == 2


@over(WHOLE)
def test_a_lease_that_another_thread_drops_waits_for_the_ranks_own(bridge):
    leases, ring = [bridge.submit(IDS).wait()], bridge._life.session.ring
    dropping = threading.Thread(target=leases.clear)
    dropping.start()
    dropping.join()
    assert ring.released == 0
    bridge.exchange(IDS)
    assert ring.released == 2


@EVERY_PLANE_THAT_LENDS
def test_leases_end_with_the_bridge(bridge):
    lease = bridge.submit(IDS).wait()
    loss = (a_student() * lease.reply.logits).sum()
    bridge.close()
    with pytest.raises(RuntimeError, match=TOO_LATE):
        loss.backward()
    lease.release()


def test_a_lease_that_is_taken_for_its_reply_says_with():
    lease = Lease(None, None, Reply({"logits": IDS}, 0, None, None))
    with pytest.raises(AttributeError, match=r"a Lease has no 'logits'. Use `with pending.wait\(\) as reply:`"):
        lease.logits  # noqa: B018
    with pytest.raises(TypeError, match=r"`reply = pending.copy\(\)`"):
        lease["logits"]
