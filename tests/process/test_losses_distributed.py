"""Losses where students live: two gloo ranks under FSDP2 and torch.compile, against one process and the plain formula.

The ranks' items are as uneven as can be: in the last micro-step rank 1 has none.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shmbridge.losses import Head, LazyLogits, count_items, forward_kl, generalized_jsd, reverse_kl
from tests.harness import Child

RANKS, STEPS, BATCH, SEQ, DIM, VOCAB = 2, 2, 2, 5, 8, 11  # the vocabulary does not divide by the ranks
SETTINGS = {"temperature": 2.0, "chunk_rows": 3}


class Student(nn.Module):
    """Embedding, one layer, head. With a teacher given, the loss is computed inside its forward, from hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layer = nn.Linear(DIM, DIM)
        self.lm_head = nn.Linear(DIM, VOCAB)

    def forward(self, ids, teacher=None, mask=None, num_items=None):
        hidden = torch.tanh(self.layer(self.embed(ids)))
        if teacher is None:
            return self.lm_head(hidden)
        head = Head(self.lm_head.weight, self.lm_head.bias, softcap=3.0)
        return forward_kl(LazyLogits(hidden, head), teacher, mask=mask, num_items=num_items, **SETTINGS)


def student() -> Student:
    torch.manual_seed(0)
    return Student()


def data():
    """ids, teacher logits and mask of every step and rank: (steps, ranks, batch, seq, ...)."""
    generator = torch.Generator().manual_seed(1)
    shape = (STEPS, RANKS, BATCH, SEQ)
    ids = torch.randint(0, VOCAB, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[-1, 1] = False
    return ids, torch.randn(*shape, VOCAB, generator=generator), mask


def reference(softcap: float | None):
    """Gradients of the mean over all items, by name, in one process and without any of our code."""
    ids, teacher, mask = data()
    model = student()
    logits = model(ids.flatten(0, 2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    temperature = SETTINGS["temperature"]
    log_q = torch.log_softmax(logits / temperature, -1)
    log_p = torch.log_softmax(teacher.flatten(0, 2) / temperature, -1)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    loss = rows[mask.flatten(0, 2)].mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def shard(*modules):
    """One group of each module, on a mesh of CPUs also where there are GPUs."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in modules:
        fully_shard(module, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, rank, loss_of):
    """Both micro-steps; then every gradient must be the reference's, and the ranks' losses average to its loss."""
    ids, teacher, mask = (tensor[:, rank] for tensor in data())
    num_items = count_items(mask)
    total = torch.zeros(())
    for step in range(STEPS):
        loss = loss_of(model, ids[step], teacher[step], mask[step], num_items)
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    return total / RANKS


def compare(model, loss, softcap=None):
    expected_loss, expected = reference(softcap)
    torch.testing.assert_close(loss, expected_loss)
    for name, parameter in model.named_parameters():
        found = whole(parameter.grad)
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def from_logits(model, ids, teacher, mask, num_items):
    return forward_kl(model(ids), teacher, mask=mask, num_items=num_items, inplace=True, **SETTINGS)


def inside(model, ids, teacher, mask, num_items):
    return model(ids, teacher, mask, num_items)


def ddp(rank):
    model = DistributedDataParallel(student())
    compare(model, train(model, rank, from_logits))


def ddp_inside(rank):
    model = DistributedDataParallel(student())
    compare(model, train(model, rank, inside), softcap=3.0)


def fsdp_logits_compiled(rank):
    model = student()
    shard(model.layer, model)
    compiled = torch.compile(model, backend="aot_eager")
    loss = train(compiled, rank, from_logits)
    compare(model, loss)


def fsdp_inside_with_the_roots_head(rank):
    """The head belongs to the root's group: a plain tensor while the root's forward runs."""
    model = student()
    shard(model.layer, model)
    compare(model, train(model, rank, inside), softcap=3.0)


def fsdp_inside_with_a_sharded_head(rank):
    """The head is a group of its own whose forward is never called: its parameters stay DTensors."""
    model = student()
    shard(model.lm_head, model)
    assert isinstance(model.lm_head.weight, DTensor)
    compare(model, train(model, rank, inside), softcap=3.0)


def fsdp_inside_compiled(rank):
    model = student()
    shard(model.lm_head, model)
    compiled = torch.compile(model, backend="aot_eager")
    compare(model, train(compiled, rank, inside), softcap=3.0)


def hsdp_inside_with_a_sharded_head(rank):
    """Two replicas of one shard each: the mean is over both dimensions of the mesh."""
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    model = student()
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compare(model, train(model, rank, inside), softcap=3.0)


def logits_as_dtensor(rank):
    """Tensor parallel: every rank computes the same loss over the gathered logits."""
    mesh = init_device_mesh("cpu", (RANKS,))
    generator = torch.Generator().manual_seed(2)
    logits, teacher = (torch.randn(3, SEQ, VOCAB, generator=generator) for _ in range(2))
    for loss_of in (forward_kl, reverse_kl, generalized_jsd):
        expected = logits.clone().requires_grad_()
        loss_of(expected, teacher, **SETTINGS).backward()
        for placement in (Shard(2), Replicate()):
            found = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            loss_of(found, teacher, **SETTINGS).backward()
            assert isinstance(found.grad, DTensor)
            torch.testing.assert_close(found.grad.full_tensor(), expected.grad)


def items(rank):
    mask = torch.ones(3, 4) if rank == 0 else torch.zeros(1, 4)
    assert count_items([mask, mask]).item() == 24 / RANKS
    assert count_items([]).item() == 1 / RANKS
    alone = dist.new_group([rank], use_local_synchronization=True)
    assert count_items([mask], alone).item() == (12 if rank == 0 else 1)


BODIES = [
    items,
    ddp,
    ddp_inside,
    fsdp_logits_compiled,
    fsdp_inside_with_the_roots_head,
    fsdp_inside_with_a_sharded_head,
    fsdp_inside_compiled,
    hsdp_inside_with_a_sharded_head,
    logits_as_dtensor,
]


@pytest.fixture(scope="module")
def loaded_compiler() -> None:
    """Compile before the ranks are forked: the modules that this imports take each rank a second and a half."""
    torch.compile(nn.Linear(2, 2), backend="aot_eager")(torch.ones(1, 2)).sum().backward()
    torch.compiler.reset()


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("loaded_compiler")
def test_two_ranks_give_the_gradient_of_one_process(body, tmp_path):
    if "sdp" in body.__name__ and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch (2.6) cannot run FSDP2 on the CPU")

    def run(rank):
        store = dist.FileStore(str(tmp_path / "store"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=50))
        body(rank)
        dist.destroy_process_group()

    ranks = [Child(lambda rank=rank: run(rank)) for rank in range(RANKS)]
    try:
        assert [child.join() for child in ranks] == [0] * RANKS
    finally:
        for child in ranks:
            child.end()
