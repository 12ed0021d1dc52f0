"""Lent tensors: who still refers to them when the lease ends is told once; who does not, never."""

from __future__ import annotations

import gc
import logging

import pytest
import torch

from shmbridge import cuda_plane
from shmbridge.loan import Loan
from tests import harness
from tests.fake_cuda import FakeCuda

WAYS = {
    "host": [],
    "cuda in place": ["plane=cuda_ipc", "cuda.read=in_place"],
    "cuda copy": ["plane=cuda_ipc", "cuda.read=copy"],
}
LENDS = pytest.mark.parametrize("way", ["host", "cuda in place"])
IDS = torch.arange(6).view(1, 6)


def lend() -> tuple[torch.Tensor, Loan]:
    memory = torch.arange(12.0)
    return memory, Loan({"a": memory[:6].view(2, 3), "b": memory[6:]})


def test_a_loan_lies_in_the_lenders_memory():
    memory, loan = lend()
    assert loan.tensors["a"].data_ptr() == memory.data_ptr()
    memory[6] = 77.0
    assert loan.tensors["b"][0] == 77.0
    assert not loan.tensors["a"].is_inference()


def test_nobody_refers_to_it():
    _, loan = lend()
    loan.tensors["a"].sum()
    assert loan.still_used() == []


KEEPS = {
    "a variable": lambda tensor: tensor,
    "a view": lambda tensor: tensor[1:, ::2],
    "a detached one": lambda tensor: tensor.detach(),
    "a NumPy array": lambda tensor: tensor.numpy(),
    "a graph": lambda tensor: torch.ones(2, 3, requires_grad=True) * tensor,
    "a graph of a view": lambda tensor: (torch.ones(3, requires_grad=True) * tensor[0]).exp().sum(),
}


@pytest.mark.parametrize("keeps", KEEPS)
def test_who_still_refers_to_it_is_told_by_name(keeps):
    _, loan = lend()
    kept = KEEPS[keeps](loan.tensors["a"])
    assert loan.still_used() == ["a"]
    del kept


def test_after_the_backward_the_graph_is_gone():
    _, loan = lend()
    weight = torch.ones(2, 3, requires_grad=True)
    loss = (weight * loan.tensors["a"]).sum()
    loss.backward()
    assert loan.still_used() == []
    assert torch.equal(weight.grad, torch.arange(6.0).view(2, 3))
    assert loss.requires_grad


def test_two_borrowers_of_the_same_memory_do_not_see_each_other():
    memory = torch.arange(6.0)
    first, second = Loan({"a": memory}), Loan({"a": memory})
    kept = first.tensors["a"]
    assert second.still_used() == []
    assert first.still_used() == ["a"]
    del kept


def test_under_inference_mode_too():
    with torch.inference_mode():
        memory = torch.arange(6.0)
        loan = Loan({"a": memory})
        assert not loan.tensors["a"].is_inference()
    kept = torch.ones(6, requires_grad=True) * loan.tensors["a"]
    assert loan.still_used() == ["a"]
    del kept


# Through the bridge


def floats(batch) -> dict[str, torch.Tensor]:
    return {"rows": batch.input_ids.float()}


@pytest.fixture
def bridge(way, request, monkeypatch):
    monkeypatch.setattr(cuda_plane, "cuda_ipc", FakeCuda())
    with harness.bench(1, *WAYS[way], *getattr(request, "param", ())) as it:
        it.teacher(floats)
        bridge = it.bridge()
        yield bridge
        bridge.close()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "shmbridge")
    return lambda: [record.message for record in caplog.records if "still" in record.message]


USES = {
    "a variable": lambda rows, weight: rows,
    "a view": lambda rows, weight: rows[0],
    "a graph": lambda rows, weight: (weight * rows).sum(),
}


@LENDS
@pytest.mark.parametrize("use", USES)
def test_a_lease_that_ends_too_early_warns_once(bridge, use, warnings):
    weight, kept = torch.ones(6, requires_grad=True), []
    for _ in range(3):
        with bridge.submit(IDS).wait() as reply:
            kept.append(USES[use](reply["rows"], weight))
    assert len(warnings()) == 1
    assert "the lease on sequence 0" in warnings()[0]
    assert "its rows: a variable, or a graph whose backward is still to come" in warnings()[0]
    assert "pending.copy()" in warnings()[0]


@LENDS
def test_a_backward_inside_the_lease_does_not_warn(bridge, warnings):
    weight = torch.ones(6, requires_grad=True)
    for _ in range(3):
        with bridge.submit(IDS).wait() as reply:
            loss = (weight * reply["rows"]).sum()
            loss.backward()
    assert warnings() == []


@pytest.mark.parametrize("way", list(WAYS))
def test_copies_are_the_ranks_own(bridge, warnings):
    kept = [bridge.exchange(IDS)["rows"] for _ in range(3)]
    assert all(torch.equal(rows, IDS.float()) for rows in kept)
    assert warnings() == []


@pytest.mark.parametrize("way", ["cuda copy"])
def test_a_lease_on_a_copy_may_end_early(bridge, warnings):
    kept = []
    for turn in range(4):
        with bridge.submit(IDS + turn).wait() as reply:
            kept.append(reply["rows"])
    assert [torch.equal(rows, IDS.float() + turn) for turn, rows in enumerate(kept)] == [True] * 4
    assert warnings() == []


STREAMS = pytest.mark.parametrize("bridge", [["payload.stream={chunk_positions: 2, chunks: 2}"]], indirect=True)


@LENDS
@STREAMS
def test_a_chunk_that_is_kept_warns_and_one_that_is_not_does_not(bridge, warnings):
    for _, chunk in bridge.submit(IDS).chunks():
        total = chunk["rows"].sum()
    assert total == 9
    assert warnings() == []
    kept = [chunk["rows"] for _, chunk in bridge.submit(IDS).chunks()]
    assert len(kept) == 3
    assert len(warnings()) == 1


@LENDS
def test_it_holds_without_the_garbage_collector(bridge, warnings):
    """Storages are counted: nothing of ours is in a cycle that only a collector would end."""
    gc.disable()
    try:
        for _ in range(20):
            with bridge.submit(IDS).wait() as reply:
                reply["rows"].sum()
            with bridge.submit(IDS).wait() as reply:
                reply = None
    finally:
        gc.enable()
    assert warnings() == []
